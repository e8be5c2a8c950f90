"""What one program may use. Standard library alone: the supervisor imports it with nothing else on its path."""

from __future__ import annotations

import resource
from typing import NamedTuple

__all__ = ["Limits"]

_MIB = 1 << 20
_STACK = 64 * _MIB


class Limits(NamedTuple):
    """Limits of one case; those of memory and output hold for all processes of it together, CPU time for each."""

    seconds: float = 6.0
    """Wall time, and CPU time of each process."""
    memory_mib: int = 1024
    """Address space of each process; and memory that all of them together may really use."""
    processes: int = 16
    """Processes and threads at once."""
    output_kib: int = 1024
    """Standard output."""
    files_mib: int = 64
    """Everything written to the file system; each file may be as large."""
    open_files: int = 64

    def impose(self) -> None:
        """Set the limits of the calling process, for good, and of its children."""
        cpu = max(1, int(self.seconds + 0.999))
        for what, wanted in (
            (resource.RLIMIT_CPU, cpu),
            (resource.RLIMIT_AS, self.memory_mib * _MIB),
            (resource.RLIMIT_NPROC, self.processes),
            (resource.RLIMIT_FSIZE, self.files_mib * _MIB),
            (resource.RLIMIT_NOFILE, self.open_files),
            (resource.RLIMIT_STACK, _STACK),
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MEMLOCK, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
        ):
            _, hard = resource.getrlimit(what)
            value = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
            resource.setrlimit(what, (value, value))
