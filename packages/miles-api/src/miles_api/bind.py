"""Check a loaded hook against its stub and call it the way the stub says."""

from __future__ import annotations

import asyncio
import functools
import inspect
import time
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import HookSignatureError
from miles_api.load import Origin, import_reference, origin_of

if TYPE_CHECKING:
    from concurrent.futures import Executor

    from miles_api.args import Args
    from miles_api.spec import Form, HookSpec

__all__ = ["BoundHook", "HookStats", "bind", "resolve"]

_P = inspect.Parameter
_VARIADIC = (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)


class HookStats(msgspec.Struct):
    """How often a hook ran in this process, for how long, and how often it raised."""

    calls: int = 0
    seconds: float = 0.0
    errors: int = 0


class BoundHook:
    """A hook that was loaded, checked and is ready to be called with the stub's arguments."""

    def __init__(
        self, spec: HookSpec, reference: str, target: Any, form: Form, keywords: frozenset[str] | None
    ) -> None:
        self.spec = spec
        self.reference = reference
        self.target = target
        self.form = form
        self.keywords = keywords
        """Which keyword-only arguments it takes; None takes all."""
        self.origin: Origin = origin_of(target)
        self.stats = HookStats()
        call = target if inspect.isroutine(target) or isinstance(target, functools.partial) else type(target).__call__
        self.is_async = inspect.iscoroutinefunction(call) or inspect.iscoroutinefunction(target)

    def __repr__(self) -> str:
        return f"BoundHook({self.spec.name} = {self.reference})"

    def _kept(self, keywords: dict[str, Any]) -> dict[str, Any]:
        if self.keywords is None:
            return keywords
        return {key: value for key, value in keywords.items() if key in self.keywords}

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call a `def` hook in this thread. Exceptions are the hook's own and are not wrapped."""
        started = time.perf_counter()
        self.stats.calls += 1
        try:
            return self.target(*args, **self._kept(keywords))
        except BaseException:
            self.stats.errors += 1
            raise
        finally:
            self.stats.seconds += time.perf_counter() - started

    async def acall(self, executor: Executor, *args: Any, **keywords: Any) -> Any:
        """Call the hook from an event loop: a `def` runs in `executor`, so that it cannot block the loop."""
        if not self.is_async:
            call = functools.partial(self.__call__, *args, **keywords)
            return await asyncio.get_running_loop().run_in_executor(executor, call)
        started = time.perf_counter()
        self.stats.calls += 1
        try:
            return await self.target(*args, **self._kept(keywords))
        except BaseException:
            self.stats.errors += 1
            raise
        finally:
            self.stats.seconds += time.perf_counter() - started


def resolve(spec: HookSpec, reference: str, args: Args | None = None) -> BoundHook:
    """Import `reference` and bind it; `args` builds callable classes. Raises a `HookError` that explains itself."""
    found = import_reference(reference, short_names=spec.group, flag=spec.flag or spec.name)
    return bind(spec, reference, found, args)


def bind(spec: HookSpec, reference: str, found: Any, args: Args | None = None) -> BoundHook:
    """Choose the form that `found` fits; raise `HookSignatureError` showing both sides when none or two fit."""
    if spec.kind == "value":
        return BoundHook(spec, reference, found, spec.forms[0], None)
    if not callable(found):
        raise HookSignatureError(f"{spec.flag} {reference} is a {type(found).__name__}, not something to call")
    if isinstance(found, type) and spec.kind != "class":
        class_forms = [form for form in spec.forms if isinstance(form.stub, type)]
        if class_forms:
            _require_fit(spec, reference, found, [(class_forms[0], _call_signature(found, drop_self=True))])
            return BoundHook(spec, reference, found, class_forms[0], None)
        found = _instantiate(found, args)
    if spec.kind == "class":
        _require_methods(spec, reference, found)
        form, keywords = _require_fit(spec, reference, found, [(spec.forms[0], _call_signature(found, drop_self=True))])
        return BoundHook(spec, reference, found, form, keywords)
    forms = [form for form in spec.forms if not isinstance(form.stub, type)]
    signature = _call_signature(found)
    form, keywords = _require_fit(spec, reference, found, [(form, signature) for form in forms])
    hook = BoundHook(spec, reference, found, form, keywords)
    _require_color(hook)
    return hook


def _instantiate(cls: type, args: Args | None) -> Any:
    try:
        inspect.signature(cls, follow_wrapped=False).bind(args)
    except TypeError:
        return cls()
    return cls(args)


def _call_signature(found: Any, *, drop_self: bool = False) -> inspect.Signature | None:
    """Return the signature of the outer callable: a decorator's own, not that of what it wraps."""
    try:
        if drop_self:
            return inspect.signature(found.__init__, follow_wrapped=False)
        return inspect.signature(found, follow_wrapped=False)
    except (ValueError, TypeError):
        return None


def _require_fit(
    spec: HookSpec, reference: str, found: Any, candidates: list[tuple[Form, inspect.Signature | None]]
) -> tuple[Form, frozenset[str] | None]:
    fits: list[tuple[Form, frozenset[str] | None]] = []
    problems: list[str] = []
    for form, signature in candidates:
        if signature is None:
            return form, None
        try:
            fits.append((form, _fit(spec, form, signature)))
        except TypeError as error:
            problems.append(str(error))
    if len(fits) > 1 and _catches_all(candidates[0][1]):
        fits = fits[:1]
    if len(fits) == 1:
        return fits[0]
    name = getattr(found, "__qualname__", type(found).__name__)
    calls = "\n                 or: ".join(f"{spec.name}{_shown(form)}" for form, _ in candidates)
    problem = " / ".join(problems) if not fits else f"it fits {len(fits)} forms; give its parameters the stub's count"
    raise HookSignatureError(
        f"{spec.flag} {reference} does not fit\n"
        f"  miles calls: {calls}\n  it declares: {name}{candidates[0][1]}\n  problem:     {problem}"
    )


def _fit(spec: HookSpec, form: Form, theirs: inspect.Signature) -> frozenset[str] | None:
    """Bind the call that Miles makes; return the keyword-only arguments to pass, None for all."""
    ours = [p for p in form.signature.parameters.values() if p.name != "self" and p.kind not in _VARIADIC]
    skip = {"self"} & set(theirs.parameters)
    dummy = [None] * len(skip)
    takes_any_keyword = any(p.kind is _P.VAR_KEYWORD for p in theirs.parameters.values())
    if spec.by_keyword:
        accepted = {p.name for p in ours if takes_any_keyword or _by_name(theirs, p.name)}
        theirs.bind(*dummy, **dict.fromkeys(accepted))
        return None if takes_any_keyword else frozenset(accepted)
    positional = [None for p in ours if p.kind is not _P.KEYWORD_ONLY]
    keywords = [p.name for p in ours if p.kind is _P.KEYWORD_ONLY]
    accepted = {key for key in keywords if takes_any_keyword or _by_name(theirs, key)}
    theirs.bind(*dummy, *positional, **dict.fromkeys(accepted))
    return None if takes_any_keyword else frozenset(accepted)


def _by_name(signature: inspect.Signature, name: str) -> bool:
    parameter = signature.parameters.get(name)
    return parameter is not None and parameter.kind in (_P.POSITIONAL_OR_KEYWORD, _P.KEYWORD_ONLY)


def _catches_all(signature: inspect.Signature | None) -> bool:
    return signature is not None and any(p.kind is _P.VAR_POSITIONAL for p in signature.parameters.values())


def _shown(form: Form) -> str:
    parameters = [p.replace(annotation=_P.empty) for p in form.signature.parameters.values() if p.name != "self"]
    return str(inspect.Signature(parameters))


def _require_methods(spec: HookSpec, reference: str, found: Any) -> None:
    stub = spec.forms[0].stub
    wanted = [name for name, value in vars(stub).items() if inspect.isfunction(value) and name != "__init__"]
    missing = [name for name in wanted if not name.startswith("_") and not callable(getattr(found, name, None))]
    if "__call__" in wanted and not any("__call__" in vars(base) for base in getattr(found, "__mro__", ())):
        missing.append("__call__")
    if not isinstance(found, type) or missing:
        what = f"lacks {', '.join(missing)}" if missing else "is not a class"
        raise HookSignatureError(f"{spec.flag} {reference} {what}; a {spec.name} is a class with {', '.join(wanted)}")


def _require_color(hook: BoundHook) -> None:
    """Refuse `async def` where Miles calls synchronously, and `def` where it awaits."""
    if hook.spec.either_color or hook.form.is_async == hook.is_async or hook.target is None:
        return
    wanted, got = ("async def", "def") if hook.form.is_async else ("def", "async def")
    raise HookSignatureError(f"{hook.spec.flag} {hook.reference} must be `{wanted}`, it is `{got}`")
