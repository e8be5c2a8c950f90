"""A filter of system calls: what namespaces do not hold back, and doors into the kernel that no solution needs."""

from __future__ import annotations

import ctypes
import os
import struct
import sys

from miles_hooks_contrib.sandbox.kernel import set_filter

__all__ = ["forbid_system_calls"]

_AF_UNIX = 1
_EPERM = 1
# What gets around the network namespace (io_uring, which makes sockets), keys of the user that all his processes share,
# doors into the kernel, ways to hold up process 1, which may have the same user as a program, and memory that counts as
# no process's: files without a name, and the buffers of sockets, which can be made larger.
_FORBIDDEN = {
    "x86_64": {
        "ptrace": 101, "unshare": 272, "setns": 308, "add_key": 248, "request_key": 249, "keyctl": 250, "bpf": 321,
        "perf_event_open": 298, "userfaultfd": 323, "io_uring_setup": 425, "open_by_handle_at": 304, "mount": 165,
        "setpriority": 141, "ioprio_set": 251, "sched_setparam": 142, "sched_setscheduler": 144,
        "sched_setaffinity": 203, "sched_setattr": 314, "syslog": 103,
        "memfd_create": 319, "memfd_secret": 447, "vmsplice": 278, "shmget": 29, "msgget": 68, "semget": 64,
        "setsockopt": 54,
    },
    "aarch64": {
        "ptrace": 117, "unshare": 97, "setns": 268, "add_key": 217, "request_key": 218, "keyctl": 219, "bpf": 280,
        "perf_event_open": 241, "userfaultfd": 282, "io_uring_setup": 425, "open_by_handle_at": 265, "mount": 40,
        "setpriority": 140, "ioprio_set": 30, "sched_setparam": 118, "sched_setscheduler": 119,
        "sched_setaffinity": 122, "sched_setattr": 274, "syslog": 116,
        "memfd_create": 279, "memfd_secret": 447, "vmsplice": 75, "shmget": 194, "msgget": 186, "semget": 190,
        "setsockopt": 208,
    },
}  # fmt: skip
_ONLY_WITH = {
    "x86_64": {41: _AF_UNIX, 53: _AF_UNIX, 302: 0},
    "aarch64": {198: _AF_UNIX, 199: _AF_UNIX, 261: 0},
}
"""The only first argument that a call may have: a socket's family (socket, socketpair), and the process, itself, whose
limits it sets (prlimit)."""
_MMAP = {"x86_64": 9, "aarch64": 222}
_SHARED_ANONYMOUS = 0x01 | 0x20
"""Memory of a file without a name, which stays when its pages are given back (MADV_DONTNEED)."""
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_X32 = 0x40000000
_LOAD, _AND, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000 | _EPERM
_NUMBER_AT, _ARCH_AT, _FIRST_ARGUMENT_AT, _FOURTH_ARGUMENT_AT = 0, 4, 16, 40


def _filter(machine: str) -> list[tuple[int, int, int, int]]:
    """Return a BPF program: (code, jump if true, jump if false, value), jumps counted from the next line."""
    forbidden = sorted(_FORBIDDEN[machine].values())
    program = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, _AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, _X32),
        (_RETURN, 0, 0, _KILL),
    ]
    for number in forbidden:
        program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ERRNO)]
    for number, argument in _ONLY_WITH[machine].items():
        program += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _FIRST_ARGUMENT_AT),
            (_EQUAL, 0, 1, argument),
            (_RETURN, 0, 0, _ALLOW),
            (_RETURN, 0, 0, _ERRNO),
        ]
    program += [
        (_EQUAL, 0, 4, _MMAP[machine]),
        (_LOAD, 0, 0, _FOURTH_ARGUMENT_AT),
        (_AND, 0, 0, _SHARED_ANONYMOUS),
        (_EQUAL, 0, 1, _SHARED_ANONYMOUS),
        (_RETURN, 0, 0, _ERRNO),
    ]
    return [*program, (_RETURN, 0, 0, _ALLOW)]


def forbid_system_calls() -> None:
    """Refuse system calls that get around the namespaces, for this process and its children, for good.

    Needs `drop_capabilities` before it. Raises `OSError` on a machine that is neither x86-64 nor 64-bit ARM.
    """
    machine = os.uname().machine
    if machine not in _FORBIDDEN or sys.maxsize <= 1 << 32:
        raise OSError(f"no list of system calls for {machine}")
    lines = _filter(machine)
    # Kept alive by its name until the kernel has copied it.
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in lines))
    set_filter(struct.pack("HxxxxxxQ", len(lines), ctypes.addressof(program)))
