"""One grading process, from the side of the rollout that asks it; `worker` is its own side."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from typing import Any

from miles_api.errors import ConfigError, DataError

__all__ = ["GraderProcess", "NoAnswer"]

_STARTING = 120.0
"""Seconds in which a process must start and import a grader; sympy takes one, on a busy machine many."""
_CHUNK = 1 << 16
_ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Each process is one of several: a thread for each core in each of them is of no use."""


class NoAnswer(Exception):  # noqa: N818  an outcome that the pool words and counts
    """The process gave no verdict; `count` says what that is counted as."""

    def __init__(self, what: str, count: str) -> None:
        super().__init__(what)
        self.count = count


class GraderProcess:
    """A running process, asked by one thread at a time."""

    def __init__(self) -> None:
        # -P: the directory that the run was started in may hold a math.py of the user's.
        command = [sys.executable, "-P", "-m", "miles_rollout.rewards.worker", str(os.getpid())]
        env = os.environ | dict.fromkeys(_ONE_THREAD, "1")
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._to, self._from = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._to, False)
        self.pid = self._process.pid
        self._loaded: set[str] = set()
        self.usable = True
        """False once it was late or died: what it says next might be the answer to an earlier question."""

    def grade(self, score: str, message: bytes, seconds: float) -> float:
        """Return the score; importing the grader does not count towards `seconds`.

        Raises `NoAnswer`; `DataError` for a label or metadata that no answer can be graded by; `ConfigError` for a
        library that is absent.
        """
        if score not in self._loaded:
            try:
                self._ask(json.dumps([score]).encode(), _STARTING)
            except NoAnswer as why:
                # No answer is to blame for that.
                raise NoAnswer(f"a grading process did not start within {_STARTING:g} s: {why}", "errors") from why
            self._loaded.add(score)
        return float(self._ask(message, seconds))

    def _ask(self, message: bytes, seconds: float) -> Any:
        deadline = time.monotonic() + seconds
        try:
            self._write(b"%.3f %s\n" % (seconds, message), deadline)
            answer = json.loads(self._read_line(deadline))
        except NoAnswer:
            self.kill()
            raise
        except (OSError, ValueError):
            self.kill()
            raise NoAnswer(f"the grading process died (exit code {self._process.returncode})", "deaths") from None
        if "score" in answer:
            return answer["score"]
        if answer["count"] == "memory":
            self.kill()
            raise NoAnswer(f"the grading process ran out of memory: {answer['error']}", "deaths")
        if answer["count"] == "data":
            raise DataError(answer["error"])
        if answer["count"] == "import":
            raise ConfigError(f"{answer['error']}: pip install 'miles-rollout[rewards]'")
        raise NoAnswer(f"the grader raised {answer['error']}", "errors")

    def _write(self, data: bytes, deadline: float) -> None:
        view = memoryview(data)
        while view:
            self._wait(self._to, select.POLLOUT, deadline)
            view = view[os.write(self._to, view[:_CHUNK]) :]

    def _read_line(self, deadline: float) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            self._wait(self._from, select.POLLIN, deadline)
            chunk = os.read(self._from, _CHUNK)
            if not chunk:
                raise OSError("end of file")
            line += chunk
        return line

    @staticmethod
    def _wait(descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
            raise NoAnswer("the grader gave no verdict", "timeouts")

    def kill(self) -> None:
        """End it at once and collect it; may be called twice, and from another thread than the one that asks."""
        self.usable = False
        self._process.kill()
        self._process.wait()
