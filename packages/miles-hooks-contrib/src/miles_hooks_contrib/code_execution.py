"""Score a program by its tests, as APPS (arXiv 2105.09938) and LiveCodeBench (arXiv 2403.07974) do, in a sandbox.

    reward = 1 if every test passes, else 0        or, with --code-score share, the share of tests that pass

The program is the last fenced block of a response. It runs in namespaces of its own: no network, no process and no file
of this machine but the interpreter, in bounds of time, memory, processes, output and disk (`sandbox/jail.py`). Inputs
go in and outputs come out; what was expected never enters. Where the kernel allows no sandbox, the run is refused.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Annotated, Literal
from weakref import WeakKeyDictionary

import msgspec

from miles_api.options import UserPath
from miles_hooks_contrib.code_tests import cases_of, program_in
from miles_hooks_contrib.sandbox.limits import Limits
from miles_hooks_contrib.sandbox.session import Session, require_sandbox

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["CodeExecution", "CodeOptions"]

_Positive = Annotated[int, msgspec.Meta(ge=1)]
_LEAST_MEMORY = 64


class CodeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a program may use, and how its tests become a reward."""

    code_score: Literal["all", "share"] = "all"
    """`all`: 1 if every test passes, else 0, and the first failure ends it. `share`: the share of tests that pass."""
    code_seconds: Annotated[float, msgspec.Meta(gt=0)] = 6.0
    """Wall time of one test, and CPU time of each process; past it the test fails."""
    code_memory_mib: Annotated[int, msgspec.Meta(ge=_LEAST_MEMORY)] = 1024
    """Memory of one test: the address space of each process, and what all of them together use."""
    code_processes: _Positive = 16
    """Processes and threads of one test."""
    code_output_kib: _Positive = 1024
    """What one test may print."""
    code_files_mib: _Positive = 64
    """What one test may write to files, in a directory that is thrown away."""
    code_concurrency: _Positive | None = None
    """Programs that run at once; default: as many as this process may use cores."""
    code_packages: UserPath | None = None
    """A directory of libraries that programs may import (`pip install --target DIR numpy`); default: none."""
    allow_unsandboxed: bool = False
    """Run programs without namespaces, with limits alone: they see every file and the network, as you do."""


class CodeExecution:
    """The reward hook: run the program of a response on the tests of its label."""

    options = CodeOptions

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` where a sandbox cannot be made, unless --allow-unsandboxed."""
        self._sandboxed = not args.allow_unsandboxed
        self._packages: str | None = args.code_packages
        self._all = args.code_score == "all"
        self._limits = Limits(
            seconds=args.code_seconds,
            memory_mib=args.code_memory_mib,
            processes=args.code_processes,
            output_kib=args.code_output_kib,
            files_mib=args.code_files_mib,
        )
        self._concurrency = args.code_concurrency or len(os.sched_getaffinity(0))
        self._slots: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = WeakKeyDictionary()
        if self._sandboxed:
            require_sandbox(self._packages)

    async def __call__(self, args: Args, sample: Sample) -> float:
        """Return the score. Called once a sample, concurrently.

        A program that fails, hangs or takes more than it may fails its test. Raises `DataError` for a label without
        tests and `ServiceError` where the sandbox itself fails: neither is ever a score.
        """
        tests = cases_of(sample)
        program = program_in(sample.response)
        if program is None:
            return 0.0
        loop = asyncio.get_running_loop()
        passed = 0
        async with self._slots.setdefault(loop, asyncio.Semaphore(self._concurrency)), self._session(program) as ran:
            for test in tests:
                outcome = await ran.run(test.case)
                if outcome.completed and test.passed(outcome.stdout, outcome.result):
                    passed += 1
                elif self._all:
                    return 0.0
        return passed / len(tests)

    def _session(self, program: str) -> Session:
        return Session(program, self._limits, packages=self._packages, sandboxed=self._sandboxed)
