"""A hook that was loaded and checked, and how it is called."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.args import Args
from miles_api.compat import adapt
from miles_api.errors import HookVersionError
from miles_api.loading.deprecation import warn_of_deprecations
from miles_api.loading.fit import Fit, fit, is_async, require_no_generator
from miles_api.loading.load import Found, Origin, find, origin_of, unwrapped
from miles_api.loading.negotiate import HookAbi, abi_of, require_compatible
from miles_api.sample import Sample

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from miles_api.spec import Form, HookSpec

__all__ = ["DEFAULT", "BoundHook", "HookStats", "bind", "resolve"]

DEFAULT = "default"
"""The reference of a hook that the run does not name: an installed package's own."""


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

    def __init__(
        self,
        spec: HookSpec,
        reference: str,
        target: Any,
        how: Fit,
        view: Args | None,
        *,
        origin: Origin,
        abi: HookAbi,
    ) -> None:
        self.spec = spec
        self.reference = reference
        self.target = target
        self.view = view
        self.is_async = is_async(target)
        self.origin = origin
        self.abi = abi
        """The ABI it was written for."""
        self.stats = HookStats()
        self._how = how
        self._args_at = _args_position(how.form)

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

    @property
    def checkable(self) -> bool:
        """Whether its signature could be checked; a bare `(*args, **kwargs)` says nothing and gets everything."""
        return self._how.checkable

    @property
    def configured(self) -> bool:
        """Whether the run names it; False for a default."""
        return self.reference != DEFAULT

    def built(self, *arguments: Any) -> BoundHook:
        """Return a hook that calls a new instance of this one's class. Its exceptions name the hook."""
        try:
            instance = self.target(*arguments)
        except Exception as error:
            error.add_note(f"raised while the {self.spec.name} hook {self.reference} was built")
            raise
        return self.calling(instance)

    def calling(self, instance: Any) -> BoundHook:
        """Return a hook that calls `instance`, built from this one's class."""
        how = msgspec.structs.replace(self._how, constructs=False)
        return BoundHook(self.spec, self.reference, instance, how, self.view, origin=self.origin, abi=self.abi)

    def _note(self, error: BaseException, args: tuple[Any, ...]) -> None:
        """Count an error, and say under the traceback which hook it was and on which sample."""
        # A call that we cancel has not failed.
        if isinstance(error, asyncio.CancelledError):
            return
        self.stats.errors += 1
        # A hook that runs another one passes on what that raised.
        if not isinstance(error, Exception) or any(n.startswith("raised by the ") for n in _notes(error)):
            return
        error.add_note(f"raised by the {self.spec.name} hook {self.reference}")
        for sample in [value for value in args if isinstance(value, Sample)]:
            error.add_note(
                f"on sample {sample.index}: prompt {sample.prompt!r:.200}, response {sample.response!r:.200}, "
                f"label {sample.label!r:.200}"
            )

    def _mine(self, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, ...]:
        """Return the positional arguments with the hook's own view of `args`; take out keywords it does not accept."""
        view, at = self.view, self._args_at
        if view is not None and at < len(args) and isinstance(args[at], Args):
            args = (view, *args[1:]) if at == 0 else (*args[:at], view, *args[at + 1 :])
        if keywords:
            if view is not None and isinstance(keywords.get("args"), Args):
                keywords["args"] = view
            wanted = self._how.keywords
            if wanted is not None and not keywords.keys() <= wanted:
                for name in keywords.keys() - wanted:
                    del keywords[name]
        return args

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call a `def` hook in this thread. Exceptions are the hook's own and are not wrapped."""
        stats = self.stats
        stats.calls += 1
        started = perf_counter()
        try:
            return self.target(*self._mine(args, keywords), **keywords)
        except BaseException as error:
            self._note(error, args)
            raise
        finally:
            stats.seconds += perf_counter() - started

    async def acall(self, executor: Executor | None, *args: Any, **keywords: Any) -> Any:
        """Call the hook from an event loop: a `def` runs in `executor`, so that it cannot block the loop."""
        stats = self.stats
        stats.calls += 1
        started = perf_counter()
        try:
            mine = self._mine(args, keywords)
            if self.is_async:
                return await self.target(*mine, **keywords)
            call = functools.partial(self.target, *mine, **keywords)
            result = await asyncio.get_running_loop().run_in_executor(executor, call)
            # A plain function may hand back an awaitable: a decorator around an `async def`, say.
            return await result if inspect.isawaitable(result) else result
        except BaseException as error:
            self._note(error, args)
            raise
        finally:
            stats.seconds += perf_counter() - started


def _args_position(form: Form) -> int:
    """Return where the stub has `args`, or a place that no call reaches: looked up once, not in every call."""
    names = list(form.signature.parameters)
    return names.index("args") if "args" in names and not isinstance(form.stub, type) else sys.maxsize


def _notes(error: Exception) -> list[str]:
    return getattr(error, "__notes__", [])


def resolve(spec: HookSpec, reference: str, view: Args | None = None) -> BoundHook:
    """Import `reference` and check it. Raises a `HookError` that explains itself."""
    found = find(reference, short_names=spec.group, flag=spec.flag or spec.name)
    return _bind(spec, reference, found, view)


def bind(spec: HookSpec, reference: str, target: Any, view: Args | None = None) -> BoundHook:
    """Check a loaded `target` against the stub; `view` is what the hook gets as `args`.

    Raises `HookVersionError` for one of another ABI, `HookSignatureError` for one that does not fit the stub.
    """
    return _bind(spec, reference, Found(target, ""), view)


def _bind(spec: HookSpec, reference: str, found: Found, view: Args | None) -> BoundHook:
    # What the user wrote says where it is from and for which ABI; an adapter around it would speak for us.
    origin = origin_of(found)
    try:
        abi = abi_of(unwrapped(found.target), origin.distribution)
    except HookVersionError as error:
        raise HookVersionError(f"{spec.flag or spec.name} {reference}: {error}") from error
    require_compatible(spec, reference, abi)
    require_no_generator(spec, reference, found.target)
    target = adapt(spec, reference, found.target)
    how = fit(spec, reference, target, abi)
    if reference != DEFAULT:
        warn_of_deprecations(spec, reference, how)
    return BoundHook(spec, reference, target, how, view, origin=origin, abi=abi)
