"""One hook under test: called as the framework calls it, and every finding put into the author's words."""

from __future__ import annotations

import asyncio
import inspect
import tempfile
import threading
import time
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from miles_api.errors import MilesError
from miles_api.loading.hookset import close
from miles_api.loading.load import TRAINER_PACKAGES
from miles_api.loading.plain import make_plain, plain_number
from miles_api.sample import Sample
from miles_api.testing.engine import Engine
from miles_api.testing.result import ConformanceError, ConformanceSkip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.testing.samples import Maker

__all__ = ["BLOCK_LIMIT", "DEADLINE", "Trial"]

DEADLINE = 60.0
"""Seconds that one awaited call may take."""
BLOCK_LIMIT = 1.0
"""Seconds for which an async hook may keep the event loop from everybody else."""
_TICK = 0.02


class _Threads(Executor):
    """A thread for each call, abandoned at exit: a hook that hangs must not keep the test run from ending."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def work() -> None:
            try:
                result = fn(*args, **kwargs)
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        threading.Thread(target=work, daemon=True, name="hook").start()
        return future


class Trial:
    """Calls one hook and notes what was found; a context manager, since it serves an engine and keeps a directory."""

    def __init__(self, hook: BoundHook, args: Callable[[Trial], Args], maker: Maker) -> None:
        """`args` gives the hook's options once the trial's own address and directory are known."""
        self.hook = hook
        self.maker = maker
        self.passed: list[str] = []
        self.notes: list[str] = []
        self.engine = Engine()
        self._make_args = args
        self._title = "calls"
        self._open = ExitStack()

    def __enter__(self) -> Trial:
        self.directory = Path(self._open.enter_context(tempfile.TemporaryDirectory(prefix="miles-check-")))
        if self.hook.spec.stage in ("rollout", "agents"):
            self._open.enter_context(self.engine)
        self._runner = self._open.enter_context(asyncio.Runner())
        self.args = self.hook.view = self._make_args(self)
        if self.hook.constructs and not isinstance(self.hook.form.stub, type):
            with self.check("is built"):
                self.build(*_constructor_arguments(self.hook))
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def build(self, *arguments: Any, **keywords: Any) -> Any:
        """Build the hook's class; from then on the instance is called. Returns it."""
        instance = self.guarded(lambda: self.hook.target(*arguments, **keywords))
        self.hook = self.hook.calling(instance)
        return instance

    def finish(self) -> None:
        """Close an instance as the end of a run does."""
        target = self.hook.target
        if not inspect.isroutine(target) and not isinstance(target, type) and _closable(target):
            with self.check("closes"):
                self.guarded(lambda: self._runner.run(asyncio.wait_for(close(target), DEADLINE)))

    # What was found

    @contextmanager
    def check(self, title: str) -> Iterator[None]:
        """Note a check as passed, or say which one failed."""
        before, self._title = self._title, title
        try:
            yield
        except (ConformanceError, ConformanceSkip):
            raise
        except MilesError as error:
            self.fail(str(error), cause=error)
        self._title = before
        self.passed.append(title)

    def fail(
        self,
        problem: str,
        *,
        sample: Sample | None = None,
        field: str | None = None,
        cause: BaseException | None = None,
    ) -> NoReturn:
        """Raise a `ConformanceError` that names hook, check, sample and field."""
        raise ConformanceError(
            problem, hook=self.hook.spec.name, reference=self.hook.reference, check=self._title,
            sample=sample.index if sample is not None else None, field=field,
        ) from cause  # fmt: skip

    def require(self, holds: Any, problem: str, *, sample: Sample | None = None, field: str | None = None) -> None:
        """Fail with `problem` unless `holds`."""
        if not holds:
            self.fail(problem, sample=sample, field=field)

    def note(self, remark: str) -> None:
        """Remark something once that is no failure."""
        if remark not in self.notes:
            self.notes.append(remark)

    def number(self, value: Any, what: str, sample: Sample | None = None) -> float:
        """Return one finite number, whatever library it is of; fail otherwise."""
        try:
            return plain_number(value, "it", what)
        except MilesError as error:
            self.fail(str(error), sample=sample, field=what, cause=error)

    def sound(self, samples: Sequence[Sample]) -> None:
        """Fail unless the fields of each sample agree with each other, as conversion needs them to."""
        for sample in samples:
            self.require(isinstance(sample, Sample), f"found a {type(sample).__name__} where a Sample belongs")
            try:
                make_plain(sample, "it")
                sample.validate()
            except MilesError as error:
                self.fail(str(error), sample=sample, field=_field_in(str(error)), cause=error)

    # How it is called

    @property
    def awaited(self) -> bool:
        """Whether Miles calls it from an event loop."""
        return self.hook.spec.either_color or self.hook.is_async

    def call(self, *args: Any, **keywords: Any) -> Any:
        """Call the hook once."""
        return self.together([args], **keywords)[0]

    def together(self, calls: Sequence[tuple[Any, ...]], **keywords: Any) -> list[Any]:
        """Call the hook once for each tuple of arguments, at the same time where Miles does so too."""
        if not self.awaited:
            return [self.guarded(lambda args=args: self.hook(*args, **keywords), _sample_in(args)) for args in calls]
        # A task of the hook's own that exits ends the loop from under its call.
        return self.guarded(lambda: self._runner.run(self._gather(calls, keywords)))

    async def _gather(self, calls: Sequence[tuple[Any, ...]], keywords: dict[str, Any]) -> list[Any]:
        pulse = _Pulse()
        beating = asyncio.ensure_future(pulse.beat())
        results = await asyncio.gather(*(self._one(args, keywords) for args in calls), return_exceptions=True)
        pulse.note()
        beating.cancel()
        for args, result in zip(calls, results, strict=True):
            if isinstance(result, BaseException):
                self.guarded(lambda result=result: _raise(result), _sample_in(args))
        # A first call alone may import what it needs.
        if self.hook.is_async and len(calls) > 1 and pulse.longest > BLOCK_LIMIT:
            self.fail(
                f"kept the event loop for {pulse.longest:.1f} s, in which nothing else ran: await what takes time, "
                "run it with asyncio.to_thread, or write the hook as a plain `def`"
            )
        return results

    async def _one(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        deadline = asyncio.timeout(DEADLINE)
        try:
            async with deadline:
                return await self.hook.acall(_Threads(), *args, **keywords)
        except TimeoutError:
            if deadline.expired():
                self.fail(f"did not return within {DEADLINE:.0f} s")
            raise
        except SystemExit as error:
            # It would end the loop, and the other calls with it.
            self._raised(error, _sample_in(args))

    def guarded(self, call: Callable[[], Any], sample: Sample | None = None) -> Any:
        """Return what `call` does; an exception of the hook's becomes a `ConformanceError` that it is the cause of."""
        try:
            return call()
        except (ConformanceError, ConformanceSkip):
            raise
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] in TRAINER_PACKAGES:
                raise ConformanceSkip(f"{self.hook.spec.name} hook {self.hook.reference} needs {error.name}") from error
            self._raised(error, sample)
        except (Exception, SystemExit) as error:
            self._raised(error, sample)

    def _raised(self, error: Exception | SystemExit, sample: Sample | None) -> NoReturn:
        if isinstance(error, SystemExit):
            self.fail(f"called sys.exit({error.code!r}), which ends a run", sample=sample, cause=error)
        notes = [note for note in getattr(error, "__notes__", []) if not note.startswith("raised by")]
        self.fail("\n  ".join([f"raised {type(error).__name__}: {error}", *notes]), sample=sample, cause=error)


class _Pulse:
    """Measures for how long an event loop went without a turn for others."""

    def __init__(self) -> None:
        self.longest = 0.0
        self._last = time.perf_counter()

    async def beat(self) -> None:
        while True:
            await asyncio.sleep(_TICK)
            self.note()

    def note(self) -> None:
        now = time.perf_counter()
        self.longest = max(self.longest, now - self._last - _TICK)
        self._last = now


def _raise(error: BaseException) -> NoReturn:
    raise error


def _sample_in(args: tuple[Any, ...]) -> Sample | None:
    return next((value for value in (getattr(one, "sample", one) for one in args) if isinstance(value, Sample)), None)


def _closable(target: Any) -> bool:
    return hasattr(target, "aclose") or hasattr(target, "close")


def _constructor_arguments(hook: BoundHook) -> tuple[Any, ...]:
    """Return what a class that stands for a function is built from: `args` if it takes one positional."""
    try:
        inspect.signature(hook.target, follow_wrapped=False).bind(hook.view)
    except TypeError:
        return ()
    return (hook.view,)


def _field_in(text: str) -> str | None:
    """Return the Sample field that an error's text names first."""
    words = text.replace(":", " ").split()
    return next((word for word in words if word in Sample.__struct_fields__ and word != "index"), None)
