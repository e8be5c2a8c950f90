"""The process that runs programs, one case at a time, and ends what they leave behind. Standard library alone.

`python -I -S -X utf8 -c "… main()"` reads a job, `{"code", "limits", "sandboxed", "packages"}`, then one case after the
other, and answers each, all as frames on its standard input and output. The end of its input ends it, with everything
that it started: whoever started it need not live to see that.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import sys
import time
from pathlib import Path
from typing import Any

from miles_hooks_contrib.sandbox import frames, jail, kernel, program
from miles_hooks_contrib.sandbox.limits import Limits
from miles_hooks_contrib.sandbox.places import Jailed, Open

__all__ = ["main"]

_IN, _OUT = 0, 1
_LOOK_EVERY = 0.05
"""Seconds between two looks at memory and deadline."""
_CHUNK = 1 << 16


def main() -> None:
    """Serve one job, and return when its input ends."""
    os.umask(0o022)
    # Process 1 is deaf to signals that it does not handle, and Python handles this one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    job = frames.read(_IN)
    # If the machine runs out of memory, programs go first.
    Path("/proc/self/oom_score_adj").write_text("1000")
    if not job["sandboxed"]:
        kernel.reap_orphans()
        _serve(job, Open())
        return
    try:
        child = jail.enter()
    except OSError as error:
        frames.write(_OUT, {"refused": str(error)})
        return
    if child:
        # Process 1 has these; the end of the input is its business.
        os.close(_IN)
        os.close(_OUT)
        os.waitpid(child, 0)
        return
    _in_jail(job)


def _in_jail(job: dict[str, Any]) -> None:
    code = 1
    try:
        try:
            inside = Jailed(jail.move_in(job["packages"]))
        except OSError as error:
            frames.write(_OUT, {"refused": str(error)})
        else:
            _serve(job, inside)
        code = 0
    finally:
        os._exit(code)


def _serve(job: dict[str, Any], place: Jailed | Open) -> None:
    limits = Limits(**job["limits"])
    if job["packages"]:
        sys.path.append(jail.PACKAGES if job["sandboxed"] else job["packages"])
    frames.write(_OUT, {"ready": True})
    while (case := frames.read(_IN)) is not None:
        place.prepare(limits)
        answer = _run(job["code"], case, limits, place)
        if answer is None:
            break
        frames.write(_OUT, answer)
    os.chdir("/")


def _run(code: str, case: dict[str, Any], limits: Limits, place: Jailed | Open) -> dict[str, Any] | None:
    """Run a program on one case and return what it did; None if nobody waits for that any more."""
    given = os.memfd_create("stdin")
    with open(given, "wb", closefd=False) as file:
        file.write(case.get("stdin", "").encode(errors="replace"))
    os.lseek(given, 0, os.SEEK_SET)
    out_r, out_w = os.pipe()
    result_r, result_w = os.pipe()
    child = os.fork()
    if child == 0:
        _child(code, case, limits, place, (given, out_w, result_w))
    for descriptor in (given, out_w, result_w):
        os.close(descriptor)
    watch = _Watch(child, out_r, result_r, limits)
    try:
        cause = watch.until_done(place)
        place.kill(child)
        exit_code = _reap(child, place)
        if cause == "input":
            return None
        watch.drain()
        return watch.outcome(cause, exit_code)
    finally:
        os.close(out_r)
        os.close(result_r)


def _child(code: str, case: dict[str, Any], limits: Limits, place: Jailed | Open, files: tuple[int, int, int]) -> None:
    """Become the program; never returns."""
    exit_code = 125
    try:
        given, out, result = files
        nowhere = os.open("/dev/null", os.O_WRONLY)
        # Copies out of the way first: a descriptor may be one of those that it is about to become.
        given, out, result, nowhere = (_above(descriptor) for descriptor in (given, out, result, nowhere))
        for descriptor, place_of in ((given, 0), (out, 1), (nowhere, 2), (result, program.RESULT)):
            os.dup2(descriptor, place_of)
        os.closerange(program.RESULT + (1 if case["kind"] != "stdin" else 0), os.sysconf("SC_OPEN_MAX"))
        place.confine(limits)
        exit_code = program.become(code, case)
    finally:
        os._exit(exit_code)


def _above(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)


def _reap(child: int, place: Jailed | Open) -> int:
    """Wait until no child is left and return the exit code of the program, negative for a signal."""
    exit_code = 0
    while True:
        try:
            pid, status = os.waitpid(-1, 0)
        except ChildProcessError:
            return exit_code
        if pid == child:
            exit_code = os.waitstatus_to_exitcode(status)
        place.kill_orphans()


class _Watch:
    """Reads what a program writes, up to the limit, and looks at the clock and its memory."""

    def __init__(self, child: int, out: int, result: int, limits: Limits) -> None:
        self._limits = limits
        self._out, self._result = out, result
        self._texts = {out: bytearray(), result: bytearray()}
        self._open = {out, result}
        self._ended = os.pidfd_open(child)
        self._began = time.monotonic()
        self._most = limits.output_kib * 1024

    def until_done(self, place: Jailed | Open) -> str | None:
        """Return when the program ended, None, or why it has to: a limit, or the end of our input."""
        poll = select.poll()
        for descriptor in (self._ended, *self._open):
            poll.register(descriptor, select.POLLIN)
        # Nothing comes in while a case runs: only the end can.
        poll.register(_IN, select.POLLIN)
        try:
            while True:
                for descriptor, _ in poll.poll(_LOOK_EVERY * 1000):
                    if descriptor in (_IN, self._ended):
                        return "input" if descriptor == _IN else None
                    if not self._take(descriptor):
                        poll.unregister(descriptor)
                if cause := self._exceeded(place):
                    return cause
        finally:
            os.close(self._ended)

    def _exceeded(self, place: Jailed | Open) -> str | None:
        if time.monotonic() - self._began > self._limits.seconds:
            return "time"
        if any(len(text) > self._most for text in self._texts.values()):
            return "output"
        return place.exceeds(self._limits)

    def _take(self, descriptor: int) -> bool:
        """Read some of what was written; False at its end."""
        part = os.read(descriptor, _CHUNK)
        self._texts[descriptor] += part
        if not part:
            self._open.discard(descriptor)
        return bool(part)

    def drain(self) -> None:
        """Read the rest, once nobody is left to write more; up to the limit."""
        for descriptor in list(self._open):
            # An end that a program sent into a socket and left there outlives it, until the kernel collects it.
            os.set_blocking(descriptor, False)
            with contextlib.suppress(BlockingIOError):
                while len(self._texts[descriptor]) <= self._most and self._take(descriptor):
                    pass

    def outcome(self, cause: str | None, exit_code: int) -> dict[str, Any]:
        """Return what the program did, as it is answered."""
        too_much = any(len(text) > self._most for text in self._texts.values())
        if cause is None and exit_code == -signal.SIGXCPU:
            cause = "time"
        return {
            "cause": cause or ("output" if too_much else None),
            "exit_code": exit_code,
            "stdout": self._texts[self._out][: self._most].decode(errors="replace"),
            "result": self._texts[self._result][: self._most].decode(errors="replace"),
            "seconds": round(time.monotonic() - self._began, 4),
        }


if __name__ == "__main__":
    main()
