"""Namespaces, and a root directory with nothing but Python in it: an ordinary process becomes process 1 of its own.

Seen from inside: no network, no other process, no file but the interpreter's and system libraries (read-only), a few
devices and an empty /tmp. User 65534 without capabilities, who cannot make namespaces of his own.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from miles_hooks_contrib.sandbox import kernel, seccomp

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["NOBODY", "PACKAGES", "enter", "fresh_tmp", "leave_privileges", "move_in"]

NOBODY = 65534
PACKAGES = "/packages"
"""Where a directory of libraries for the programs appears."""

_BASE = "/tmp"  # only a place to mount on, in a namespace of our own
_SYSTEM = ("/usr", "/lib", "/lib64", "/bin")
_DEVICES = ("null", "full", "random", "urandom")  # memory mapped from /dev/zero would be counted nowhere
_NO_MORE = kernel.MS_NOSUID | kernel.MS_NODEV


def enter() -> int:
    """Move this process to new namespaces and return the pid of a child that is process 1 there, 0 in the child.

    Root gets himself and nobody mapped, so that he can reach the interpreter wherever it lies; others nobody alone.
    Raises `OSError` where the kernel refuses.
    """
    root = os.geteuid() == 0
    helper = _map_from_outside() if root else None
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.NAMESPACES)
    if helper is None:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{NOBODY} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{NOBODY} {group} 1")
    else:
        helper()
    pid = os.fork()
    if pid == 0:
        kernel.die_with_parent()
    return pid


def _map_from_outside() -> Callable[[], None]:
    """Fork a process that stays outside and maps our users when asked, which only it may; return how to ask it."""
    asked_r, asked_w = os.pipe()
    parent, pid = os.getpid(), os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(asked_w)
            if os.read(asked_r, 1):
                for file in ("uid_map", "gid_map"):
                    Path(f"/proc/{parent}/{file}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
                code = 0
        finally:
            os._exit(code)
    os.close(asked_r)

    def ask() -> None:
        os.write(asked_w, b"1")
        os.close(asked_w)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            raise OSError("mapping users into the namespace was refused")

    return ask


def move_in(packages: str | None) -> int:
    """Build the root directory and move there; return a descriptor of a /proc of this namespace, which no path reaches.

    Called by process 1. Raises `OSError` with the step that failed.
    """
    kernel.mount("none", "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    kernel.mount("tmpfs", _BASE, "tmpfs", _NO_MORE, "size=1m,nr_inodes=1000,mode=755")
    old = f"{_BASE}/old"
    Path(old).mkdir()
    kernel.pivot(_BASE, old)
    os.chdir("/")
    for path in _SYSTEM:
        _show(path)
    for path in dict.fromkeys((sys.base_prefix, sys.base_exec_prefix)):
        if not Path(path).exists():
            _show(path)
    if packages:
        _show(packages, PACKAGES)
    _devices()
    for path in ("/proc", "/tmp"):
        Path(path).mkdir()
    kernel.mount("proc", "/proc", "proc", _NO_MORE)
    # Namespaces within this one would hand capabilities back.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    proc = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    kernel.detach("/proc")
    kernel.detach("/old")
    Path("/old").rmdir()
    kernel.mount("none", "/", None, kernel.MS_REMOUNT | kernel.MS_BIND | kernel.MS_RDONLY | _NO_MORE)
    return proc


def _show(path: str, at: str | None = None) -> None:
    """Show a file or directory of the machine inside, read-only; a link stays one."""
    source, target = Path("/old") / path.lstrip("/"), Path(at or path)
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_dir():
        target.mkdir(parents=True)
        kernel.mount(str(source), str(target), None, kernel.MS_BIND | kernel.MS_REC)
        kernel.freeze(str(target))


def _devices() -> None:
    Path("/dev").mkdir()
    Path("/dev/shm").symlink_to("/tmp")
    for name in _DEVICES:
        target = Path("/dev") / name
        target.touch()
        kernel.mount(f"/old/dev/{name}", str(target), None, kernel.MS_BIND)


def fresh_tmp(size_mib: int) -> None:
    """Put an empty directory in the place of /tmp and of what was in it. Called by process 1 before each program."""
    while os.path.ismount("/tmp"):
        kernel.detach("/tmp")
    kernel.mount("tmpfs", "/tmp", "tmpfs", _NO_MORE, f"size={size_mib}m,nr_inodes=10000,mode=1777")
    os.chdir("/tmp")


def leave_privileges() -> None:
    """Become nobody, without capabilities, for good; called by the process that then runs a program."""
    kernel.drop_bounding_set()
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    kernel.drop_capabilities()
    seccomp.forbid_system_calls()
