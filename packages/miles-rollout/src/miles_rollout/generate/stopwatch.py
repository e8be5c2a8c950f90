"""How long anything was under way, where several things are at the same time."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Stopwatch"]


class Stopwatch:
    """Runs while at least one `running()` is open."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """How long it ran until it last stood still."""
        self._open = 0
        self._since = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let it run until the end of the block."""
        if self._open == 0:
            self._since = time.perf_counter()
        self._open += 1
        try:
            yield
        finally:
            self._open -= 1
            if self._open == 0:
                self.seconds += time.perf_counter() - self._since
