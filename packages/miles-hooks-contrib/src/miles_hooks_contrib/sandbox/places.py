"""Where programs run: as seen by the supervisor that prepares, watches and clears it. Standard library alone."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from miles_hooks_contrib.sandbox import jail

if TYPE_CHECKING:
    from miles_hooks_contrib.sandbox.limits import Limits

__all__ = ["Jailed", "Open"]

_CHUNK = 1 << 16
_PAGE = os.sysconf("SC_PAGE_SIZE")


class Jailed:
    """The programs' surroundings with namespaces; used by process 1 there."""

    def __init__(self, proc: int) -> None:
        self._proc = proc

    def prepare(self, limits: Limits) -> None:
        """Make an empty directory and move there."""
        jail.fresh_tmp(limits.files_mib)

    def confine(self, limits: Limits) -> None:
        """Take rights away from the process that is to run a program."""
        limits.impose()
        # The process group reaches out of the namespace: to the supervisor's parent, whom a user could kill with it.
        os.setsid()
        jail.leave_privileges()

    def exceeds(self, limits: Limits) -> str | None:
        """Return `processes` or `memory` where all programs together have too much of it."""
        names = os.listdir(self._proc)  # noqa: PTH208  a directory that has no path any more
        pids = [name for name in names if name.isdigit() and name != "1"]
        # The kernel's own limit does not hold for every user: not for root in a container of users, say.
        if len(pids) > limits.processes:
            return "processes"
        most = limits.memory_mib << 20
        # What forks share is counted once by the second, which takes the kernel far longer.
        return "memory" if sum(map(self._resident, pids)) > most < sum(map(self._proportional, pids)) else None

    def _resident(self, pid: str) -> int:
        return int((self._told(f"{pid}/statm") or b"0 0").split()[1]) * _PAGE

    def _proportional(self, pid: str) -> int:
        found = re.search(rb"^Pss: +(\d+) kB", self._told(f"{pid}/smaps_rollup"), re.MULTILINE)
        # A process may hide this, and counts in full then.
        return int(found[1]) << 10 if found else self._resident(pid)

    def _told(self, path: str) -> bytes:
        """Return what the kernel says; nothing of a process that ended."""
        try:
            file = os.open(path, os.O_RDONLY, dir_fd=self._proc)
        except OSError:
            return b""
        try:
            return os.read(file, _CHUNK)
        except OSError:
            return b""
        finally:
            os.close(file)

    def kill(self, child: int) -> None:
        """Kill every other process of the namespace."""
        # Anywhere else this would kill everything that the user owns.
        if os.getpid() != 1:
            raise RuntimeError("not process 1: refusing to kill all processes")
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    def kill_orphans(self) -> None:
        """Do nothing: all processes died at once."""


class Open:
    """The programs' surroundings without namespaces: limits and a directory, and nothing that holds a program in."""

    def __init__(self) -> None:
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    def prepare(self, limits: Limits) -> None:
        """Make an empty directory and move there."""
        os.chdir("/")
        if self._directory is not None:
            self._directory.cleanup()
        self._directory = tempfile.TemporaryDirectory(prefix="miles-code-", ignore_cleanup_errors=True)
        os.chdir(self._directory.name)

    def confine(self, limits: Limits) -> None:
        """Take rights away from the process that is to run a program."""
        limits.impose()
        os.setsid()

    def exceeds(self, limits: Limits) -> str | None:
        """Return None: only the limits of each process hold."""
        return None

    def kill(self, child: int) -> None:
        """Kill the program, which was not waited for yet, and its process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)

    def kill_orphans(self) -> None:
        """Kill our children: those whose own parents died, which left the program's process group perhaps."""
        for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
