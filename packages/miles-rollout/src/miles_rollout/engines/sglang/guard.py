"""Runs one server and leaves nothing of it behind: `guard.py PARENT_PID GRACE COMMAND …`.

The server and all that it starts are ended when the parent is gone, however it went, when the server itself has died,
and when this process is told to end: then it gets `GRACE` seconds for it. Ends as the server did. Needs the standard
library alone, and never changes directory or environment.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import time

__all__ = ["main"]

_LOOK = 0.5
_LAST_WAIT, _LAST_LOOK = 3.0, 0.005
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_AWAITED = (signal.SIGCHLD, signal.SIGTERM, signal.SIGINT)


def main(argv: list[str]) -> int:
    """Run the command and return its exit code; one that a signal ended ends this process by the same."""
    parent, grace, command = int(argv[0]), float(argv[1]), argv[2:]
    signal.pthread_sigmask(signal.SIG_BLOCK, _AWAITED)
    # What the server leaves is ours then, and gone as soon as we have looked; the init of a container may never look.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    server = subprocess.Popen(command, start_new_session=True, preexec_fn=_in_server)  # noqa: PLW1509  no threads here
    deadline: float | None = None
    while not _has_ended(server):
        left = _LOOK if deadline is None else min(max(deadline - time.monotonic(), 0.0), _LOOK)
        told = signal.sigtimedwait(_AWAITED, left)
        if told is not None and told.si_signo != signal.SIGCHLD and deadline is None:
            server.terminate()
            deadline = time.monotonic() + grace
        if os.getppid() != parent or (deadline is not None and time.monotonic() >= deadline):
            _kill_all(server)
    # Before it is reaped, and its number may be another's.
    _kill_all(server)
    status = server.wait()
    _await_the_rest(server)
    if status < 0:
        _die_by(-status)
    return status


def _in_server() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _AWAITED)
    # Should the guard itself be killed.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(OSError, AttributeError):  # Linux alone has it
        ctypes.CDLL(None).prctl(option, value)


def _has_ended(server: subprocess.Popen[bytes]) -> bool:
    return os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _kill_all(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(server.pid, signal.SIGKILL)


def _await_the_rest(server: subprocess.Popen[bytes]) -> None:
    """Wait until what was killed has let go of its memory: the next server may need it."""
    deadline = time.monotonic() + _LAST_WAIT
    with contextlib.suppress(ProcessLookupError, PermissionError):
        while time.monotonic() < deadline:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-server.pid, os.WNOHANG)
            os.killpg(server.pid, 0)
            time.sleep(_LAST_LOOK)


def _die_by(number: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, ValueError):  # SIGKILL has no handler to reset
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
    os.kill(os.getpid(), number)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
