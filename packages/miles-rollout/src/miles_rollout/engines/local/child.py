"""One engine process as its fleet sees it: how it ends, and what it said before."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["Child"]

_STOP_GRACE = 5.0
_TAIL_LINES, _TAIL_BYTES = 20, 1 << 16


class Child:
    """A running or ended engine. `errors` is its stderr, a deleted temporary file that it writes to."""

    def __init__(self, index: int, process: subprocess.Popen[bytes], endpoint: Endpoint, errors: IO[bytes]) -> None:
        self.index, self.process, self.endpoint = index, process, endpoint
        self._errors = errors
        self._errors_lock = threading.Lock()
        self._told_to_end = False
        self._watcher: threading.Thread | None = None

    def last_lines(self) -> str:
        """Return the end of what it wrote on stderr; nothing after `end`."""
        with self._errors_lock:
            if self._errors.closed:
                return ""
            descriptor = self._errors.fileno()
            # not seek and read: the offset is also where the engine writes next
            tail = os.pread(descriptor, _TAIL_BYTES, max(os.fstat(descriptor).st_size - _TAIL_BYTES, 0))
        return "\n".join(tail.decode(errors="replace").splitlines()[-_TAIL_LINES:])

    def why_dead(self) -> str:
        """Say how it died and what it said last; return an empty string if it lives or was told to end."""
        status = self.process.poll()
        if status is None or self._told_to_end:
            return ""
        said = self.last_lines() or "(nothing on stderr)"
        return f"engine {self.index} (pid {self.process.pid}) died with exit code {status}: {said}"

    def watch(self) -> None:
        """Print `why_dead` on stderr should it die from now on."""
        self._watcher = threading.Thread(target=self._watch, name=f"engine-{self.index}-watch", daemon=True)
        self._watcher.start()

    def tell_to_end(self) -> None:
        """Send SIGTERM; one that is dead already keeps its own reason."""
        if self.process.poll() is None:
            self._told_to_end = True
            self.process.terminate()

    def end(self) -> None:
        """Wait until it has ended, if need be by SIGKILL; may be called twice."""
        self.tell_to_end()
        try:
            self.process.wait(_STOP_GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._watcher is not None:
            self._watcher.join()
        with self._errors_lock:
            self._errors.close()

    def _watch(self) -> None:
        self.process.wait()
        if text := self.why_dead():
            print(text, file=sys.stderr, flush=True)
