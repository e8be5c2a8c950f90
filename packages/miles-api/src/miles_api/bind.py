"""A hook that was loaded and checked, and how it is called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.args import Args
from miles_api.compat import adapt
from miles_api.fit import Fit, fit, is_async
from miles_api.load import Origin, import_reference, origin_of
from miles_api.sample import Sample

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from miles_api.spec import Form, HookSpec

__all__ = ["BoundHook", "HookStats", "bind", "resolve"]


class HookStats(msgspec.Struct):
    """How often a hook ran in this process, for how long, and how it fared."""

    calls: int = 0
    seconds: float = 0.0
    errors: int = 0
    """Calls that raised or returned what they may not, retries included."""
    timeouts: int = 0
    """Calls that ran past --hook-timeout."""
    retries: int = 0
    skipped: int = 0
    """Moments at which it was due but had nothing to do: a reward that generation had set, a step without samples."""
    drops: dict[str, int] = msgspec.field(default_factory=dict)
    """What it dropped, by reason."""


class BoundHook:
    """A hook that is ready to be called with the stub's arguments.

    Where the stub has `args`, the hook gets a view of its own, so that what it writes there is seen by nobody else.
    """

    def __init__(self, spec: HookSpec, reference: str, target: Any, how: Fit, view: Args | None) -> None:
        self.spec = spec
        self.reference = reference
        self.target = target
        self.view = view
        self.is_async = is_async(target)
        self.origin: Origin = origin_of(target)
        self.stats = HookStats()
        self._how = how

    def __repr__(self) -> str:
        return f"BoundHook({self.spec.name} = {self.reference})"

    @property
    def form(self) -> Form:
        """The form of the stub that the hook is written in."""
        return self._how.form

    @property
    def constructs(self) -> bool:
        """Whether it is a class that still has to be built."""
        return self._how.constructs

    def built(self, *arguments: Any) -> BoundHook:
        """Return a hook that calls an instance of this one's class."""
        how = Fit(self._how.form, self._how.keywords, False)
        return BoundHook(self.spec, self.reference, self.target(*arguments), how, self.view)

    def _mine(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> functools.partial[Any]:
        """Return the call with the hook's own view of `args` and without the keywords it does not take."""
        wanted = self._how.keywords
        kept = {k: self._own(v) for k, v in keywords.items() if wanted is None or k in wanted}
        return functools.partial(self.target, *map(self._own, args), **kept)

    def _own(self, value: Any) -> Any:
        return self.view if isinstance(value, Args) and self.view is not None else value

    def _note(self, error: BaseException, args: tuple[Any, ...]) -> None:
        """Count an error, and say under the traceback which hook it was and on which sample."""
        self.stats.errors += 1
        if not isinstance(error, Exception):
            return
        error.add_note(f"raised by the {self.spec.name} hook {self.reference}")
        for sample in [value for value in args if isinstance(value, Sample)]:
            error.add_note(
                f"on sample {sample.index}: prompt {sample.prompt!r:.200}, response {sample.response!r:.200}, "
                f"label {sample.label!r:.200}"
            )

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call a `def` hook in this thread. Exceptions are the hook's own and are not wrapped."""
        started = time.perf_counter()
        self.stats.calls += 1
        try:
            return self._mine(args, keywords)()
        except BaseException as error:
            self._note(error, args)
            raise
        finally:
            self.stats.seconds += time.perf_counter() - started

    async def acall(self, executor: Executor | None, *args: Any, **keywords: Any) -> Any:
        """Call the hook from an event loop: a `def` runs in `executor`, so that it cannot block the loop."""
        started = time.perf_counter()
        self.stats.calls += 1
        call = self._mine(args, keywords)
        try:
            result = call() if self.is_async else await asyncio.get_running_loop().run_in_executor(executor, call)
            # A plain function may hand back an awaitable: a decorator around an `async def`, say.
            return await result if inspect.isawaitable(result) else result
        except BaseException as error:
            self._note(error, args)
            raise
        finally:
            self.stats.seconds += time.perf_counter() - started


def resolve(spec: HookSpec, reference: str, view: Args | None = None) -> BoundHook:
    """Import `reference` and check it. Raises a `HookError` that explains itself."""
    found = import_reference(reference, short_names=spec.group, flag=spec.flag or spec.name)
    return bind(spec, reference, found, view)


def bind(spec: HookSpec, reference: str, found: Any, view: Args | None = None) -> BoundHook:
    """Check `found` against the stub; `view` is what the hook gets as `args`."""
    found = adapt(spec, reference, found)
    return BoundHook(spec, reference, found, fit(spec, reference, found), view)
