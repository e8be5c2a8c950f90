"""One engine process as its fleet sees it: how it ends, and what it said before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import ExitStack
from typing import IO, TYPE_CHECKING

from miles_rollout.engines.health import HealthWatch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from miles_api.services import Endpoint

__all__ = ["Child"]

_STOP_GRACE = 5.0
_TAIL_LINES, _TAIL_BYTES = 20, 1 << 16


class Child:
    """A running or ended engine. `errors` is its stderr, a deleted temporary file that it writes to."""

    def __init__(
        self,
        index: int,
        process: subprocess.Popen[bytes],
        endpoint: Endpoint,
        errors: IO[bytes],
        *,
        serves: bool = True,
        until_it_answers: Iterable[AbstractContextManager[object]] = (),
        grace: float = _STOP_GRACE,
    ) -> None:
        """`serves` is False for a part that answers nobody; after `grace` seconds a request to end becomes an order.

        What is needed `until_it_answers`, such as a socket that holds its port, is closed then, or when it ends: for a
        part that answers nobody only then.
        """
        self.index, self.process, self.endpoint, self.serves = index, process, endpoint, serves
        self._errors = errors
        self._grace = grace
        self._at_start = ExitStack()
        for each in until_it_answers:
            self._at_start.enter_context(each)
        self._errors_lock = threading.Lock()
        self._told_to_end = False
        self._watcher: threading.Thread | None = None
        self._health: HealthWatch | None = None

    def last_lines(self) -> str:
        """Return the end of what it wrote on stderr, without its key; nothing after `end`."""
        with self._errors_lock:
            if self._errors.closed:
                return ""
            descriptor = self._errors.fileno()
            # not seek and read: the offset is also where the engine writes next
            tail = os.pread(descriptor, _TAIL_BYTES, max(os.fstat(descriptor).st_size - _TAIL_BYTES, 0))
        if key := self.endpoint.key.encode():
            tail = tail.replace(key, b"(the key)")
        return "\n".join(tail.decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def why_dead(self) -> str:
        """Say how it died, or why it counts as dead, and what it said last; empty if it lives or was told to end."""
        status = self.process.poll()
        if self._told_to_end:
            return ""
        if status is not None:
            return f"{self._name} died with exit code {status}: {self._said()}"
        silent = self._health.problem if self._health is not None else ""
        return f"{self._name} {silent}: {self._said()}" if silent else ""

    def watch(self, health_timeout: float = 0.0) -> None:
        """Print `why_dead` on stderr should it die from now on, or not react for so many seconds; 0 is for ever."""
        if self.serves:  # another one may not have begun to read what it needs
            self._at_start.close()
        self._watcher = threading.Thread(target=self._watch, name=f"engine-{self.index}-watch", daemon=True)
        self._watcher.start()
        if self.serves:
            key = self.endpoint.key
            self._health = HealthWatch(self.endpoint.url, health_timeout, lambda _: self._report(), key=key)

    def tell_to_end(self) -> None:
        """Send SIGTERM; one that is dead already keeps its own reason."""
        if self._health is not None:
            self._health.stop()
        if self.process.poll() is None:
            self._told_to_end = True
            self.process.terminate()

    def end(self) -> None:
        """Wait until it has ended, if need be by SIGKILL; may be called twice."""
        self.tell_to_end()
        self._at_start.close()
        try:
            self.process.wait(self._grace)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._watcher is not None:
            self._watcher.join()
        with self._errors_lock:
            self._errors.close()

    @property
    def _name(self) -> str:
        return f"engine {self.index} (pid {self.process.pid})"

    def _said(self) -> str:
        return self.last_lines() or "(nothing on stderr)"

    def _watch(self) -> None:
        self.process.wait()
        self._report()

    def _report(self) -> None:
        if text := self.why_dead():
            print(text, file=sys.stderr, flush=True)
