"""The near side of a sandbox: start a supervisor, ask it case by case, and be sure that it is gone afterwards."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError, ServiceError
from miles_hooks_contrib.sandbox import frames
from miles_hooks_contrib.sandbox.limits import Limits

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["Outcome", "Session", "require_sandbox"]

_SOURCE = str(Path(__file__).parents[2])
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from miles_hooks_contrib.sandbox.supervisor import main; "
    "sys.path.pop(0); main()"
)
_COMMAND = [sys.executable, "-I", "-S", "-X", "utf8", "-c", _START, _SOURCE]
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8"}
_GRACE = 10.0
"""Seconds that a supervisor gets beyond its program's own; it is our code, and the machine may be busy."""


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a program did on one case."""

    cause: str | None
    """Why it was stopped: `time`, `memory`, `processes` or `output`; None if it ended by itself."""
    exit_code: int
    """Negative for the signal that killed it."""
    stdout: str
    result: str
    """What a call returned, as JSON; `ok` after assertions that all held."""
    seconds: float

    @property
    def completed(self) -> bool:
        """Whether it ran to its end without an error."""
        return self.cause is None and self.exit_code == 0


def _job(code: str, limits: Limits, packages: str | None, sandboxed: bool) -> dict[str, Any]:
    return {"code": code, "limits": limits._asdict(), "packages": packages, "sandboxed": sandboxed}


def require_sandbox(packages: str | None = None) -> None:
    """Raise `ConfigError` with the step that failed where this machine does not allow a sandbox."""
    job = frames.pack(_job("", Limits(), packages, sandboxed=True))
    try:
        done = subprocess.run(
            _COMMAND, input=job, capture_output=True, env=_ENVIRONMENT, timeout=60, check=False, start_new_session=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"the sandbox of code_execution did not start: {error}") from error
    answer: dict[str, Any] = {}
    if len(done.stdout) > frames.LENGTH.size:
        answer = msgspec.json.decode(done.stdout[frames.LENGTH.size :])
    if "ready" not in answer:
        why = answer.get("refused") or done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ConfigError(
            f"this machine does not let code_execution make a sandbox ({why or 'it ended without a word'}): user, "
            "network, mount and process namespaces are needed (Linux 5.14; in a container, a seccomp profile that "
            "allows unshare and mount). Programs that a model wrote would see every file and the network: allow the "
            "namespaces, or accept that with --allow-unsandboxed"
        )


class Session:
    """One program and the process that runs it on cases: `async with Session(…) as session: await session.run(…)`.

    Leaving it, whether by cancellation or an error, ends every process that it started.
    """

    def __init__(self, code: str, limits: Limits, *, packages: str | None = None, sandboxed: bool = True) -> None:
        self._job = _job(code, limits, packages, sandboxed)
        self._limits = limits
        self._process: asyncio.subprocess.Process | None = None

    async def __aenter__(self) -> Session:
        try:
            self._process = await asyncio.create_subprocess_exec(
                *_COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            raise ServiceError(f"code_execution could not start a process for a program: {error}") from error
        try:
            answer = await self._ask(self._job, "start")
            if "refused" in answer:
                raise ServiceError(f"code_execution could not make a sandbox: {answer['refused']}")
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._end()

    async def run(self, case: dict[str, Any]) -> Outcome:
        """Run the program on one case; `program.become` says what a case is.

        Raises `ServiceError` when the supervisor does not answer: that is never the program's fault.
        """
        return msgspec.convert(await self._ask(case, "answer"), Outcome)

    async def _ask(self, document: Any, what: str) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the session is not open")
        limit = self._limits.seconds + _GRACE
        try:
            async with asyncio.timeout(limit):
                process.stdin.write(frames.pack(document))
                await process.stdin.drain()
                header = await process.stdout.readexactly(frames.LENGTH.size)
                return msgspec.json.decode(await process.stdout.readexactly(frames.LENGTH.unpack(header)[0]))
        except TimeoutError as error:
            raise ServiceError(f"the supervisor of code_execution did not {what} within {limit:g} s") from error
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            raise ServiceError(f"the supervisor of code_execution died before it could {what}") from error

    async def _end(self) -> None:
        """End the supervisor by the end of its input, so that it collects what it started; by force if it must be."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        waiting = asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait_for(asyncio.shield(waiting), _GRACE)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await waiting
            if not isinstance(error, TimeoutError):
                raise
