"""Ask the processes of a run what all their threads do, without their cooperation.

Each process of a run calls `register`. From then on a signal makes it write the stack of every thread to a file of its
own, also while it hangs in C code or waits for a lock; and should it crash, it writes them there by itself. The signal
is SIGUSR2: cluster schedulers announce the end of a job by SIGUSR1.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["VARIABLE", "collect", "innermost_frames", "kept_in", "register"]

VARIABLE = "MILES_STACKS"
"""The environment variable that names the directory, for processes that the driver starts itself."""

_SIGNAL = signal.SIGUSR2
_PATIENCE, _POLL = 3.0, 0.1


def register(name: str, directory: str | None = None) -> None:
    """Let this process write its stacks to `directory`/NAME-PID.txt when it is asked to, and when it crashes.

    Called at the start of every process of a run. Without `directory` it is the one that the environment names, and
    without either nothing happens.
    """
    directory = directory or os.environ.get(VARIABLE)
    if not directory:
        return
    Path(directory).mkdir(parents=True, exist_ok=True)
    # Opened now: a process that hangs can open nothing.
    file = Path(directory, f"{name}-{os.getpid()}.txt").open("wb")  # noqa: SIM115  faulthandler keeps it open
    faulthandler.enable(file)
    faulthandler.register(_SIGNAL, file)


def collect(directory: Path) -> dict[str, str]:
    """Make every process of this machine that registered there write its stacks; return them by NAME-PID.

    Waits three seconds at most. A process that did not answer, such as a stopped one, has an empty text; one that has
    ended is left out.
    """
    files = {file: file.stat().st_size for file in directory.glob("*.txt") if _is_open(file)}
    for file in files:
        with suppress(ProcessLookupError):
            os.kill(_pid_of(file), _SIGNAL)
    _wait_until_written(files)
    return {file.stem: file.read_bytes()[before:].decode(errors="replace") for file, before in files.items()}


def innermost_frames(text: str, count: int) -> list[str]:
    """Return where the main thread is, innermost first: `File "…", line N in function`; empty if it says nothing."""
    # The threads stand there newest first, so the main thread is the last.
    _, _, block = text.rpartition("(most recent call first):\n")
    return [line.strip() for line in block.splitlines() if line.startswith("  File ")][:count]


@contextmanager
def kept_in(directory: Path) -> Iterator[None]:
    """Let what this process starts in the block register in `directory`; afterwards remove what nobody wrote to."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(directory)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
        _tidy(directory)


def _tidy(directory: Path) -> None:
    for file in directory.glob("*.txt"):
        if not file.stat().st_size:
            file.unlink()
    # It stays while a file lies in it.
    with suppress(OSError):
        directory.rmdir()


def _pid_of(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])


def _is_open(file: Path) -> bool:
    """Say whether the process that the file belongs to lives here and has it open: a process id alone may be another's,
    whom the signal would end."""
    there = file.stat()
    try:
        return any(os.path.samestat(there, one.stat()) for one in Path(f"/proc/{_pid_of(file)}/fd").iterdir())
    except OSError:
        # It has ended, closes files right now, or is not ours to look at.
        return False


def _wait_until_written(before: dict[Path, int]) -> None:
    """Wait until each file has grown and then stayed as it is for a moment."""
    deadline = time.monotonic() + _PATIENCE
    seen: dict[Path, int] = {}
    while time.monotonic() < deadline:
        sizes = {file: file.stat().st_size for file in before}
        if sizes == seen and all(sizes[file] > size for file, size in before.items()):
            return
        seen = sizes
        time.sleep(_POLL)
