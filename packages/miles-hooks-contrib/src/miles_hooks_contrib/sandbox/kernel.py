"""The system calls behind a sandbox, as Python functions; each raises `OSError` with what was tried."""

from __future__ import annotations

import ctypes
import os
import struct

__all__ = [
    "MS_BIND",
    "MS_NODEV",
    "MS_NOSUID",
    "MS_PRIVATE",
    "MS_RDONLY",
    "MS_REC",
    "MS_REMOUNT",
    "NAMESPACES",
    "detach",
    "die_with_parent",
    "drop_bounding_set",
    "drop_capabilities",
    "freeze",
    "mount",
    "pivot",
    "reap_orphans",
    "set_filter",
    "unshare",
]

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
NAMESPACES = 0x10000000 | 0x00020000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000 | 0x02000000
"""User, mount, process, network, IPC, host name, control group."""

_MNT_DETACH = 2
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP, _PR_SET_SECCOMP = 1, 24, 22
_SECCOMP_MODE_FILTER = 2
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_DUMPABLE = 36, 38, 4
_SIGKILL = 9
_LAST_CAPABILITY = 64
_CAPABILITIES_V3 = 0x20080522
_AT_FDCWD, _AT_RECURSIVE, _SYS_MOUNT_SETATTR = -100, 0x8000, 442
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4

_libc = ctypes.CDLL(None, use_errno=True)


def _must(result: int, what: str) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave the namespaces named by `flags` for new ones."""
    _must(_libc.unshare(flags), "unshare")


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Call mount(2)."""
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    _must(_libc.mount(*texts, ctypes.c_ulong(flags), data.encode()), f"mount {target}")


def freeze(target: str) -> None:
    """Make a mount and all below it read-only, without set-uid programs and devices. Needs Linux 5.12."""
    attributes = struct.pack("QQQQ", _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    result = _libc.syscall(
        _SYS_MOUNT_SETATTR, _AT_FDCWD, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(len(attributes))
    )
    _must(result, f"mount_setattr {target}")


def pivot(root: str, old: str) -> None:
    """Make `root` the root directory; the former one appears at `old`, below it."""
    _must(_libc.pivot_root(root.encode(), old.encode()), "pivot_root")


def detach(target: str) -> None:
    """Take a mount out of sight at once; what is open in it stays open."""
    _must(_libc.umount2(target.encode(), _MNT_DETACH), f"umount {target}")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent dies; forgotten when the process gains capabilities."""
    _must(_libc.prctl(_PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0), "prctl PDEATHSIG")


def reap_orphans() -> None:
    """Become the parent of descendants whose own parents die."""
    _must(_libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "prctl CHILD_SUBREAPER")


def drop_bounding_set() -> None:
    """Rule out that a program gains capabilities when it is executed. Needs capabilities itself."""
    for capability in range(_LAST_CAPABILITY):
        # The kernel knows fewer, and refuses those that it does not know.
        _libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0)


def drop_capabilities() -> None:
    """Give up every capability for good, also for programs that are executed later."""
    header, nothing = struct.pack("II", _CAPABILITIES_V3, 0), bytes(24)
    _must(_libc.capset(header, nothing), "capset")
    _must(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl NO_NEW_PRIVS")
    # A process that changed its user hides what memory it uses, from process 1 as well.
    _must(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl DUMPABLE")


def set_filter(program: bytes) -> None:
    """Have system calls pass a BPF program, given as `struct sock_fprog`. Needs `drop_capabilities` before."""
    _must(_libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, program, 0, 0), "seccomp")
