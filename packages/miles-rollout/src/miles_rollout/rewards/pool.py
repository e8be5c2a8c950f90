"""Processes that grade: each answer within a deadline, and a process that hangs or dies is replaced.

Not `concurrent.futures`: it knows no deadline for a call, and one dead process breaks the whole pool. Not pebble: its
processes share one pipe under one lock, look for timeouts ten times a second, import the parent's `__main__`, and
outlive a killed parent while they are busy.
"""

from __future__ import annotations

import atexit
import json
import os
import queue
import threading
from collections import Counter
from concurrent.futures import Future
from typing import Any

from miles_api.errors import HookError
from miles_api.options import options_from
from miles_rollout import running
from miles_rollout.options import RewardOptions
from miles_rollout.rewards.process import GraderProcess, NoAnswer

__all__ = ["GraderError", "GraderPool", "close_pools", "default_pool", "pool_of", "take_counts"]

_MOST_WORKERS = 8


class GraderError(HookError):
    """No verdict: the grader ran past its deadline, died, ran out of memory or raised."""

    def __init__(self, message: str, *, count: str = "") -> None:
        super().__init__(message)
        self.count = count
        """`timeouts`, `deaths` or `errors`, as it was counted; empty where the pool was closed."""


class GraderPool:
    """Up to `workers` processes, started as they are needed, that grade within `timeout` seconds an answer."""

    def __init__(self, workers: int, timeout: float) -> None:
        self.size, self.timeout = workers, timeout
        self.counts: Counter[str] = Counter()
        """`timeouts`, `deaths` and `errors` since somebody took them."""
        self._queue: queue.SimpleQueue[tuple[Future[float], str, bytes] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._unfinished = 0
        self._threads: list[threading.Thread] = []
        self._processes: set[GraderProcess] = set()
        self._closed = False

    def submit(self, score: str, response: str, label: Any, metadata: dict[str, Any]) -> Future[float]:
        """Queue one call of the grader `module:function`; the future raises `GraderError` for want of a verdict.

        A label or metadata that is not JSON is graded by its text. Returns at once, from any thread.
        """
        # Not msgspec: a response may hold half a surrogate pair, which only JSON's escapes can carry.
        message = json.dumps([score, response, label, metadata], default=str).encode()
        future: Future[float] = Future()
        with self._lock:
            if self._closed:
                raise GraderError("the rollout is closed, and its graders with it")
            self._unfinished += 1
            if len(self._threads) < min(self.size, self._unfinished):
                thread = threading.Thread(target=self._serve, name=f"grader-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        self._queue.put((future, score, message))
        return future

    def _serve(self) -> None:
        """Feed one process, and the next one when it is gone."""
        process: GraderProcess | None = None
        while (work := self._queue.get()) is not None:
            future, score, message = work
            outcome: Any = None
            if future.set_running_or_notify_cancel():
                try:
                    process = self._running(process)
                    outcome = process.grade(score, message, self.timeout)
                except NoAnswer as why:
                    outcome = self._explained(why, score, len(message))
                except Exception as error:
                    outcome = error
            with self._lock:
                self._unfinished -= 1
            if isinstance(outcome, Exception):
                future.set_exception(outcome)
            elif outcome is not None:
                future.set_result(outcome)
        if process is not None:
            self._end(process)

    def _running(self, process: GraderProcess | None) -> GraderProcess:
        if process is not None and process.usable:
            return process
        if process is not None:
            self._end(process)
        # Outside the lock: starting takes a moment, and event loops wait for it in `submit`.
        process = GraderProcess()
        with self._lock:
            closed = self._closed
            if not closed:
                self._processes.add(process)
        if closed:
            process.kill()
            raise GraderError("the rollout was closed before this answer was graded")
        return process

    def _end(self, process: GraderProcess) -> None:
        process.kill()
        with self._lock:
            self._processes.discard(process)

    def _explained(self, why: NoAnswer, score: str, size: int) -> GraderError:
        if self._closed:
            return GraderError("the rollout was closed before this answer was graded")
        with self._lock:
            self.counts[why.count] += 1
        late = f" within --rm-timeout {self.timeout:g} s" if why.count == "timeouts" else ""
        way_out = "" if why.count == "errors" else " (--rm-on-timeout zero scores such answers lowest)"
        return GraderError(f"{score}: {why}{late}, on a question of {size} bytes{way_out}", count=why.count)

    def take_counts(self) -> Counter[str]:
        """Return `counts` and begin them anew."""
        with self._lock:
            taken, self.counts = self.counts, Counter()
        return taken

    def pids(self) -> list[int]:
        """Return the processes that run now."""
        with self._lock:
            return [process.pid for process in self._processes]

    def close(self) -> None:
        """Kill the processes; what waits for a verdict gets `GraderError`."""
        with self._lock:
            self._closed = True
            processes, threads = list(self._processes), list(self._threads)
        for process in processes:
            process.kill()
        for _ in threads:
            self._queue.put(None)
        for thread in threads:
            thread.join()


_pools: dict[tuple[int, float], GraderPool] = {}
_pools_lock = threading.Lock()


def pool_of(options: RewardOptions) -> GraderPool:
    """Return this process's pool of `--rm-workers` and `--rm-timeout`; it starts processes when there is work."""
    workers = options.rm_workers or min(max((os.cpu_count() or 1) // 2, 1), _MOST_WORKERS)
    key = (workers, options.rm_timeout)
    pool = _pools.get(key)
    if pool is None:
        with _pools_lock:
            pool = _pools.setdefault(key, GraderPool(*key))
    return pool


def default_pool() -> GraderPool:
    """Return the pool of the rollout that runs in this process, or one with the options' defaults."""
    args = running.announced()
    return pool_of(RewardOptions() if args is None else options_from(args, RewardOptions))


def take_counts() -> Counter[str]:
    """Return how many graders ran past their deadline, died or raised: `timeouts`, `deaths`, `errors` since then."""
    return sum((pool.take_counts() for pool in tuple(_pools.values())), Counter())


@atexit.register
def close_pools() -> None:
    """End all graders of this process; the next answer starts new ones."""
    with _pools_lock:
        pools = list(_pools.values())
        _pools.clear()
    for pool in pools:
        pool.close()


def _forget_pools() -> None:
    """Start anew in a forked process: the threads that feed the graders did not come along, and these are not ours."""
    global _pools_lock  # noqa: PLW0603  a fork may come while it is held
    _pools_lock = threading.Lock()
    _pools.clear()


os.register_at_fork(after_in_child=_forget_pools)
