"""Threads for `def` hooks, of which some may never come back."""

from __future__ import annotations

import queue
import threading
import time
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["HookCall", "HookThreads"]


class HookThreads:
    """A bounded pool of daemon threads, started as they are needed.

    Not a `ThreadPoolExecutor`: the interpreter joins its threads on exit, and one hung hook would keep the process.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._unfinished: set[HookCall] = set()

    def put(self, call: HookCall, work: Callable[[], None]) -> None:
        """Queue `work`; `call` says when it begins and ends."""
        self._unfinished.add(call)
        if len(self._threads) < min(self.size, len(self._unfinished)):
            thread = threading.Thread(target=self._serve, name=f"hook-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._queue.put(work)

    def finished(self, call: HookCall) -> None:
        """Forget a call that ended or was cancelled before it began."""
        self._unfinished.discard(call)

    def hung(self, seconds: float) -> int:
        """Return how many threads have been in one call for longer than `seconds`, cancelled calls included."""
        since = time.monotonic() - seconds
        return sum(call.started is not None and call.started < since for call in tuple(self._unfinished))

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            work()

    def close(self) -> None:
        """End the threads that are idle; those in a call end after it, if ever."""
        for _ in self._threads:
            self._queue.put(None)


class HookCall(Executor):
    """One call through the pool, as an executor: that is what `BoundHook.acall` takes."""

    def __init__(self, pool: HookThreads) -> None:
        self._pool = pool
        self.submitted = False
        self.started: float | None = None
        """When a thread took it up, on `time.monotonic`; None while it waits."""
        self.ended = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Queue the call."""
        future: Future[Any] = Future()
        self.submitted = True

        def work() -> None:
            if future.set_running_or_notify_cancel():
                self.started = time.monotonic()
                try:
                    result = fn(*args, **kwargs)
                except BaseException as error:
                    self._over()
                    future.set_exception(_deliverable(error))
                else:
                    self._over()
                    future.set_result(result)
            else:
                self._over()

        self._pool.put(self, work)
        return future

    def _over(self) -> None:
        self.ended = True
        self._pool.finished(self)


def _deliverable(error: BaseException) -> BaseException:
    """Return what a future of asyncio takes as an exception: it refuses `StopIteration`, and its caller would wait."""
    if not isinstance(error, StopIteration):
        return error
    wrapped = RuntimeError("the hook raised StopIteration")
    wrapped.__cause__ = error
    return wrapped
