"""Calls in this process: an async hook on one event loop, a `def` hook in threads, each call with a deadline."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections import deque
from time import monotonic, perf_counter
from typing import TYPE_CHECKING, Any

from miles_api.replay.subject import Failure, Reply, Subject, failure_of, timed_out

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence

    from miles_api.loading.bind import BoundHook
    from miles_api.replay.replayer import Replayer

    Tick = Callable[[int], None]

__all__ = ["THREADS", "InLoop", "InThreads", "call_once"]

THREADS = 8
"""As many as a run has for `def` hooks."""
_AT_ONCE = 64
"""Async calls under way together."""
_POLL = 0.05
_GRACE = 1.0
"""Seconds that a cancelled call may take to clean up before the replay ends without it."""
_HUNG = 16
"""Threads that may hang for good before nothing more is called: none of them can be stopped."""
_left_behind: set[asyncio.Task[Any]] = set()
"""Held until the process ends: to collect a coroutine that catches everything would run it again."""
_GAVE_UP = Failure("TimeoutError", f"not called: {_HUNG} calls before it hang (with --workers they can be ended)")


class _Server:
    """One task that makes calls until none is left, or until it is left behind in one that hangs."""

    def __init__(self, caller: InLoop, todo: Iterator[Subject], replies: list[Reply], tick: Tick) -> None:
        self._caller, self._todo, self._replies, self._tick = caller, todo, replies, tick
        self._subject: Subject | None = None
        self._since = 0.0
        self._left_behind = False
        self.task = caller.loop.create_task(self._serve())

    async def _serve(self) -> None:
        for subject in self._todo:
            self._since, self._subject = monotonic(), subject
            reply = await self._caller.call(subject)
            if self._left_behind:
                return
            self._replies.append(reply)
            self._subject = None
            self._tick(len(self._replies))

    def leave_behind(self, timeout: float) -> bool:
        """Give up the call that it is in if that is past its deadline; say so."""
        if self._subject is None or monotonic() - self._since < timeout:
            return False
        self._left_behind = True
        self._replies.append(Reply(self._subject.number, timeout, failure=timed_out(timeout)))
        self.task.cancel()
        return True


class InLoop:
    """Calls an `async def` hook, many at a time, always on the same event loop.

    A call that is cancelled at its deadline and goes on is left behind. A hook that blocks the loop cannot be
    interrupted here; another process can be ended, with `--workers`.
    """

    def __init__(self, hook: BoundHook, replayer: Replayer, timeout: float) -> None:
        self._hook, self._replayer, self._timeout = hook, replayer, timeout
        self.loop = asyncio.new_event_loop()

    def run(self, subjects: Sequence[Subject], tick: Tick) -> list[Reply]:
        """Make one call a subject; `tick` is told how many are done."""
        return self.loop.run_until_complete(self._together(subjects, tick))

    async def _together(self, subjects: Sequence[Subject], tick: Tick) -> list[Reply]:
        todo = iter(subjects)
        replies: list[Reply] = []
        running = [_Server(self, todo, replies, tick) for _ in range(min(_AT_ONCE, len(subjects)))]
        while running:
            await asyncio.wait([server.task for server in running], timeout=_POLL)
            late = [server for server in running if server.leave_behind(self._timeout)]
            for server in [one for one in running if one.task.done()]:
                # What is no failure of a call comes through.
                server.task.result()
            running = [server for server in running if server not in late and not server.task.done()]
            running += [_Server(self, todo, replies, tick) for _ in late]
        return replies

    async def call(self, subject: Subject) -> Reply:
        """Make one call."""
        started = perf_counter()
        try:
            positional, keywords = self._replayer.arguments(subject)
            value = await self._hook(*positional, **keywords)
            result = self._replayer.result(value, positional, subject)
        except asyncio.CancelledError as error:
            this = asyncio.current_task()
            if this is not None and this.cancelling():
                raise
            return Reply(subject.number, perf_counter() - started, failure=failure_of(error))
        except (Exception, SystemExit) as error:
            return Reply(subject.number, perf_counter() - started, failure=failure_of(error))
        return Reply(subject.number, perf_counter() - started, result)

    def close(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let the hook close itself on the loop that it was called on, and end the loop, whatever still runs in it."""
        # Not `asyncio.Runner`, which waits for ever for a task that swallows its cancellation.
        try:
            self._finish(self.loop.create_task(finish()))
        finally:
            left = asyncio.all_tasks(self.loop)
            for task in left:
                task.cancel()
            if left:
                _, pending = self.loop.run_until_complete(asyncio.wait(left, timeout=_GRACE))
                _left_behind.update(pending)
            self.loop.close()

    def _finish(self, task: asyncio.Task[None]) -> None:
        self.loop.run_until_complete(asyncio.wait({task}, timeout=self._timeout))
        if task.done():
            task.result()


class _Thread:
    """One thread that makes calls until none is left, or until it is left behind in one that hangs."""

    def __init__(self, pool: InThreads, todo: deque[Subject], replies: list[Reply]) -> None:
        self.subject: Subject | None = None
        self.since = 0.0
        self.left_behind = False
        self._pool, self._todo, self._replies = pool, todo, replies
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._serve, name="replay", daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                subject = self._todo.popleft()
            except IndexError:
                return
            self.since, self.subject = monotonic(), subject
            reply = self._pool.call(subject)
            with self._lock:
                if self.left_behind:
                    return
                self._replies.append(reply)
                self.subject = None

    def wait(self, seconds: float) -> bool:
        """Wait for its end; say whether it still runs."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def leave_behind(self, timeout: float) -> bool:
        """Give up the call that it is in if that is past its deadline; say so."""
        with self._lock:
            subject = self.subject
            if subject is None or monotonic() - self.since < timeout:
                return False
            self.left_behind = True
            self._replies.append(Reply(subject.number, timeout, failure=timed_out(timeout)))
            return True


class InThreads:
    """Calls a `def` hook in a few threads; one that hangs is left behind and replaced."""

    def __init__(self, hook: BoundHook, replayer: Replayer, timeout: float, threads: int = THREADS) -> None:
        self._hook, self._replayer, self._timeout, self._threads = hook, replayer, timeout, threads
        self._hung = 0

    def run(self, subjects: Sequence[Subject], tick: Tick) -> list[Reply]:
        """Make one call a subject; `tick` is told how many are done."""
        todo, replies = deque(subjects), []
        running = [_Thread(self, todo, replies) for _ in range(min(self._threads, len(todo)))]
        while running:
            running[0].wait(_POLL)
            late = [thread for thread in running if thread.leave_behind(self._timeout)]
            self._hung += len(late)
            if self._hung >= _HUNG:
                replies += [Reply(subject.number, 0.0, failure=_GAVE_UP) for subject in _emptied(todo)]
            running = [thread for thread in running if thread not in late and thread.wait(0)]
            running += [_Thread(self, todo, replies) for _ in late if todo]
            tick(len(replies))
        return replies

    def call(self, subject: Subject) -> Reply:
        """Make one call in the calling thread."""
        return call_once(self._hook, self._replayer, subject)

    def close(self, finish: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Let the hook close itself."""
        asyncio.run(finish())


def call_once(
    hook: BoundHook, replayer: Replayer, subject: Subject, wait: Callable[[Coroutine[Any, Any, Any]], Any] = asyncio.run
) -> Reply:
    """Make one call in the calling thread, without a deadline; `wait` runs what is to be awaited."""
    started = perf_counter()
    try:
        positional, keywords = replayer.arguments(subject)
        value = hook(*positional, **keywords)
        if inspect.isawaitable(value):
            value = wait(_awaited(value))
        result = replayer.result(value, positional, subject)
    except (Exception, SystemExit) as error:
        return Reply(subject.number, perf_counter() - started, failure=failure_of(error))
    return Reply(subject.number, perf_counter() - started, result)


async def _awaited(value: Any) -> Any:
    return await value


def _emptied(todo: deque[Subject]) -> list[Subject]:
    taken = []
    while todo:
        taken.append(todo.popleft())
    return taken
