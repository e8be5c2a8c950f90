"""SIGINT and SIGTERM of a run: the first ends it, and no later one disturbs how it ends."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType, TracebackType

__all__ = ["Interrupts"]


class Interrupts:
    """The signals of one run, as a context manager of the main thread.

    A signal raises nothing by itself: starting and stopping are never cut short between two lines. Whoever waits calls
    `check` now and then, and what may be cut short anywhere runs in `raising`. A signal that is ignored when the block
    begins, as under `nohup`, stays ignored.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        """The first signal that came."""
        self._raising = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for signum in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(signum) is not signal.SIG_IGN:
                self._before[signum] = signal.signal(signum, self._received)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @property
    def name(self) -> str | None:
        """The name of the signal that came, such as `SIGTERM`."""
        return None if self.signum is None else signal.Signals(self.signum).name

    @property
    def exit_code(self) -> int | None:
        """What a shell and schedulers expect of a program that a signal ended: 128 and its number."""
        return None if self.signum is None else 128 + self.signum

    def check(self) -> None:
        """Raise `KeyboardInterrupt` if a signal came; may be called from any thread."""
        if self.signum is not None:
            raise KeyboardInterrupt

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Let the first signal raise `KeyboardInterrupt` in the main thread, wherever in the block that is."""
        self.check()
        self._raising = True
        try:
            yield
        finally:
            self._raising = False

    def _received(self, signum: int, _frame: FrameType | None) -> None:
        first = self.signum is None
        if first:
            self.signum = signum
        what = "stopping, which takes a few seconds" if first else "still stopping"
        # Who reads it may have been ended by the same Ctrl-C.
        with suppress(OSError, ValueError):
            self._say(f"{signal.Signals(signum).name}: {what}")
        if first and self._raising:
            raise KeyboardInterrupt

    @staticmethod
    def _say(text: str) -> None:
        # Not print: the signal may have come in the middle of one.
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"miles train: {text}\n".encode())
