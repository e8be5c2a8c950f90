"""Name the hook that blocks the event loop: while it does, no other generation moves."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import inspect
import os
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from types import CodeType, FrameType

    from miles_api.loading.bind import BoundHook

__all__ = ["Watchdog"]

_BEAT = 0.2
_BLOCKED = 1.0
"""Seconds without a beat that are worth a warning."""


class Watchdog:
    """A thread that looks, while a rollout runs, whether its event loop still turns.

    What blocks is told from the stack of the loop's thread, so that calls themselves cost nothing. A loop that is
    blocked for `limit` seconds cannot be freed from outside: then the stacks are printed and the process ends.
    """

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._hooks: list[BoundHook] = []
        self._warned: set[str] = set()
        self.blocked: dict[str, int] = {}
        """How often each hook was found blocking, by name."""

    def add(self, hooks: Iterable[BoundHook]) -> None:
        """Look at these hooks too. Our defaults do not block, and a `def` runs in a thread."""
        self._hooks += [hook for hook in hooks if hook.configured and hook.is_async]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Watch the running event loop during the block; without `async def` hooks there is nothing to watch."""
        if not self._hooks:
            yield
            return
        loop, state = asyncio.get_running_loop(), _Beats()

        def beat() -> None:
            state.last = time.monotonic()
            state.timer = loop.call_later(_BEAT, beat)

        beat()
        thread = threading.Thread(
            target=self._watch, args=(state, threading.get_ident()), name="hook-watchdog", daemon=True
        )
        thread.start()
        try:
            yield
        finally:
            state.over.set()
            if state.timer:
                state.timer.cancel()

    def _watch(self, state: _Beats, thread: int) -> None:
        reported = 0.0
        while not state.over.wait(_BEAT):
            last = state.last
            silent = time.monotonic() - last
            if silent < _BLOCKED:
                continue
            found = self._running(sys._current_frames().get(thread))
            if found is None:
                continue
            hook, line = found
            if last != reported:
                reported = last
                self._report(hook, line)
            if silent > self._limit + _BLOCKED:
                _end(hook, line, self._limit)

    def _report(self, hook: BoundHook, line: str) -> None:
        name = hook.spec.name
        self.blocked[name] = self.blocked.get(name, 0) + 1
        if hook.reference in self._warned:
            return
        self._warned.add(hook.reference)
        print(
            f"warning: {name} hook {hook.reference} blocks the event loop (over {_BLOCKED:g} s at {line}): meanwhile "
            "no other generation or reward goes on. Await instead, or write it as `def`: then it gets a thread",
            flush=True,
        )

    def _running(self, frame: FrameType | None) -> tuple[BoundHook, str] | None:
        """Return the hook whose code is on the stack, and the innermost line of its file."""
        frames: list[FrameType] = []
        while frame is not None:
            frames.append(frame)
            frame = frame.f_back
        for matches in (_by_code, _by_file):
            for hook in self._hooks:
                for inner in frames:
                    if matches(hook, inner.f_code):
                        return hook, f"{inner.f_code.co_filename}:{inner.f_lineno}"
        return None


class _Beats:
    def __init__(self) -> None:
        self.last = time.monotonic()
        self.timer: asyncio.TimerHandle | None = None
        self.over = threading.Event()


def _by_code(hook: BoundHook, code: CodeType) -> bool:
    target: Any = hook.target if inspect.isroutine(hook.target) else vars(type(hook.target)).get("__call__")
    return target is not None and getattr(inspect.unwrap(target), "__code__", None) is code


def _by_file(hook: BoundHook, code: CodeType) -> bool:
    return bool(hook.origin.file) and code.co_filename == hook.origin.file


def _end(hook: BoundHook, line: str, limit: float) -> None:
    print(
        f"error: {hook.spec.name} hook {hook.reference} has blocked the event loop at {line} for longer than "
        f"--hook-timeout {limit:g} s; nothing can interrupt it, so the process ends",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(file=sys.stderr)
    sys.stderr.flush()
    os._exit(1)
