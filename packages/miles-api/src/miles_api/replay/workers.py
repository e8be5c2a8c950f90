"""Calls in processes of their own (`--workers`): for graders that keep a processor busy, and calls that hang.

Each process imports the reference anew, makes one call after the other and sends back each result. One that runs past
the deadline, or dies, is replaced; the call that it was in has failed.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import signal
import sys
from collections import deque
from multiprocessing.connection import wait
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.args import Args
from miles_api.errors import MilesError
from miles_api.loading.hookset import HookSet
from miles_api.packing.codec import carried, decode, encode_or_refuse
from miles_api.replay.hooks import REPLAYERS
from miles_api.replay.in_process import call_once
from miles_api.replay.subject import Failure, Reply, Subject, timed_out
from miles_api.wire import decode_groups, encode_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from multiprocessing.connection import Connection

    from miles_api.loading.bind import BoundHook
    from miles_api.replay.replayer import Replayer

    Tick = Callable[[int], None]

__all__ = ["InWorkers"]

_AHEAD = 16
"""Calls that a process is given at a time."""
_STARTING = 600.0
"""Seconds in which a process must have imported the hook, torch included."""


class InWorkers:
    """Calls a hook in `count` processes."""

    def __init__(
        self, name: str, options: dict[str, Any], recorded: dict[str, Any], timeout: float, count: int
    ) -> None:
        what = "the options of the replay"
        self._setup = encode_or_refuse([name, carried(options, what), carried(recorded, what)], what)
        self._timeout, self._count = timeout, count
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker] = []

    def run(self, subjects: Sequence[Subject], tick: Tick) -> list[Reply]:
        """Make one call a subject; `tick` is told how many are done. `MilesError` if no process can be started."""
        todo, replies = deque(subjects), []
        while todo or any(worker.given for worker in self._workers):
            wanted = min(self._count, len(todo) + sum(bool(worker.given) for worker in self._workers))
            while len(self._workers) < wanted:
                self._workers.append(_Worker(self._context, self._setup))
            for worker in self._workers:
                worker.give(todo)
            for connection in wait([worker.connection for worker in self._workers], timeout=0.05):
                worker = next(one for one in self._workers if one.connection is connection)
                self._hear(worker, todo, replies)
            for worker in [one for one in self._workers if one.late(self._timeout)]:
                self._lose(worker, timed_out(self._timeout), todo, replies)
            tick(len(replies))
        return replies

    def _hear(self, worker: _Worker, todo: deque[Subject], replies: list[Reply]) -> None:
        try:
            worker.hear(replies)
        except EOFError:
            worker.process.join()
            failure = Failure("WorkerDied", f"its process ended with exit code {worker.process.exitcode}")
            self._lose(worker, failure, todo, replies)

    def _lose(self, worker: _Worker, failure: Failure, todo: deque[Subject], replies: list[Reply]) -> None:
        """End a process; the call that it was in fails, those after it go to another."""
        worker.end()
        self._workers.remove(worker)
        if not worker.ready:
            raise MilesError(f"a process for the hook did not start: {failure.message}")
        if worker.given:
            subject = worker.given.popleft()
            replies.append(Reply(subject.number, monotonic() - worker.since, failure=failure))
        todo.extendleft(reversed(worker.given))

    def close(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:  # noqa: ARG002  the instances are theirs
        """End the processes, which close their hooks."""
        for worker in self._workers:
            worker.connection.close()
        for worker in self._workers:
            worker.process.join(self._timeout if worker.ready else 0)
            worker.end()


class _Worker:
    """One process, seen from outside."""

    def __init__(self, context: Any, setup: bytes) -> None:
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, setup), daemon=True)
        self.process.start()
        theirs.close()
        self.ready = False
        self.since = monotonic()
        """When it was last heard of."""
        self.given: deque[Subject] = deque()

    def give(self, todo: deque[Subject]) -> None:
        """Give it calls to make if it has none."""
        if self.given or not self.ready or not todo:
            return
        self.given.extend(todo.popleft() for _ in range(min(_AHEAD, len(todo))))
        self.since = monotonic()
        self.connection.send_bytes(_encoded([*self.given]))

    def hear(self, replies: list[Reply]) -> None:
        """Add what it has sent to `replies`; `EOFError`, after that, if it has ended."""
        while self.connection.poll():
            message = decode(self.connection.recv_bytes(), "a reply")
            self.since = monotonic()
            if "refused" in message:
                raise MilesError(message["refused"])
            if not self.ready:
                self.ready = True
                continue
            self.given.popleft()
            replies.append(msgspec.convert(message, Reply))

    def late(self, timeout: float) -> bool:
        """Say whether it is past the deadline of the call it is in, or of its start."""
        limit = timeout if self.ready else _STARTING
        return bool(self.given or not self.ready) and monotonic() - self.since > limit

    def end(self) -> None:
        """Kill it, whatever it does."""
        self.process.kill()
        self.process.join()
        self.connection.close()


def _encoded(subjects: list[Subject]) -> bytes:
    parts = []
    for subject in subjects:
        fields = msgspec.structs.asdict(subject)
        parts.append({**fields, "groups": encode_groups(subject.groups)})
    return encode_or_refuse(parts, "the samples of the replay")


def _decoded(data: bytes) -> list[Subject]:
    found = []
    for part in decode(data, "the samples of the replay"):
        part["groups"] = decode_groups(part["groups"])
        found.append(Subject(**part))
    return found


def _serve(connection: Connection, setup: bytes) -> None:
    """Make calls until there is nobody left who asks for them."""
    # Ctrl-C reaches all processes of a terminal: whoever started this one ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdout = sys.stderr
    name, options, recorded = decode(setup, "the options of the replay")
    with contextlib.suppress(BrokenPipeError, EOFError):
        try:
            hooks = HookSet(Args(options), [name])
        except MilesError as error:
            connection.send_bytes(encode_or_refuse({"refused": str(error)}, "a reply"))
            return
        connection.send_bytes(encode_or_refuse({"ready": True}, "a reply"))
        hook = hooks.need(name)
        replayer = REPLAYERS[name](hook.view or Args(options), f"the {name} hook {hook.reference}", recorded)
        # One event loop for all calls: a hook may keep a connection or a lock that belongs to it.
        with asyncio.Runner() as runner:
            try:
                _make_calls(connection, hook, replayer, runner)
            finally:
                runner.run(hooks.aclose())


def _make_calls(connection: Connection, hook: BoundHook, replayer: Replayer, runner: asyncio.Runner) -> None:
    while True:
        for subject in _decoded(connection.recv_bytes()):
            reply = call_once(hook, replayer, subject, runner.run)
            connection.send_bytes(encode_or_refuse(msgspec.structs.asdict(reply), "a reply"))
