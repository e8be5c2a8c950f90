"""Does a loaded object fit the stub of a hook: its form, its parameters, whether it is async."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import msgspec

from miles_api.abi import ABI, shown
from miles_api.errors import HookSignatureError
from miles_api.loading.negotiate import HookAbi, newer_keywords
from miles_api.spec import Form, HookSpec

__all__ = ["Fit", "fit", "is_async", "require_no_generator"]

_P = inspect.Parameter
_VARIADIC = (_P.VAR_POSITIONAL, _P.VAR_KEYWORD)


class Fit(msgspec.Struct, frozen=True):
    """How Miles will call a hook."""

    form: Form
    keywords: frozenset[str] | None = None
    """Which arguments it takes by name; None takes all."""
    constructs: bool = False
    """True for a class that is built first, and then called or used."""
    named: frozenset[str] = frozenset()
    """Those of the stub's keywords that its signature spells out."""
    checkable: bool = True
    """False where the signature says nothing: a bare `(*args, **kwargs)`, or a built-in without one."""


def fit(spec: HookSpec, reference: str, found: Any, abi: HookAbi | None = None) -> Fit:
    """Choose the form that `found` fits; raise `HookSignatureError` showing both sides when none or two fit.

    Nothing is called or built. The outer callable counts: a decorator's own signature, not that of what it wraps. A
    hook of an older ABI gets no keyword that came after it by a parameter that merely has the same name.
    """
    if spec.kind == "value":
        return Fit(spec.forms[0])
    abi = abi or HookAbi(ABI, "the current one")
    if not callable(found):
        raise _refuse(spec, reference, f"is a {type(found).__name__}, not something to call")
    class_forms = [form for form in spec.forms if isinstance(form.stub, type)]
    if spec.kind == "class" and not isinstance(found, type):
        raise _refuse(spec, reference, f"is not a class; a {spec.name} is one")
    if isinstance(found, type) and class_forms:
        _require_methods(spec, reference, found, class_forms[0])
        how = _require_fit(spec, reference, found, [(class_forms[0], _signature(found))], abi)
        return msgspec.structs.replace(how, constructs=True)
    constructs = isinstance(found, type)
    if constructs:
        _require_buildable(spec, reference, found)
    signature = _without_self(found) if constructs else _signature(found)
    forms = [(form, signature) for form in spec.forms if not isinstance(form.stub, type)]
    how = _require_fit(spec, reference, found, forms, abi)
    _require_color(spec, reference, how.form.is_async, is_async(found))
    return msgspec.structs.replace(how, constructs=constructs)


def is_async(found: Any) -> bool:
    """Say whether calling `found` (or an instance of it) gives something to await."""
    return inspect.iscoroutinefunction(_called(found))


def require_no_generator(spec: HookSpec, reference: str, found: Any) -> None:
    """Refuse a hook with `yield` in it; asked before an adapter of an older signature hides what it wraps."""
    if spec.kind != "value":
        _require_no_generator(spec, reference, _called(found))


def _called(found: Any) -> Any:
    """Return what runs when `found`, or an instance of it, is called."""
    if isinstance(found, type):
        return found.__call__
    return found if inspect.isroutine(found) or isinstance(found, functools.partial) else type(found).__call__


def _require_no_generator(spec: HookSpec, reference: str, called: Any, what: str = "") -> None:
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise _refuse(spec, reference, f"{what}is a generator: calling it runs nothing; `return` the result")


def _refuse(spec: HookSpec, reference: str, problem: str) -> HookSignatureError:
    return HookSignatureError(f"{spec.flag or spec.name} {reference} {problem}")


def _signature(found: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(found, follow_wrapped=False)
    except (ValueError, TypeError):
        return None


def _without_self(cls: type, name: str = "__call__") -> inspect.Signature | None:
    """Return the signature of a method as its instances have it: what a static method or `*args` takes stays."""
    signature, held = _signature(getattr(cls, name)), inspect.getattr_static(cls, name)
    if signature is None or isinstance(held, staticmethod | classmethod) or not hasattr(held, "__get__"):
        return signature
    parameters = list(signature.parameters.values())
    keeps = not parameters or parameters[0].kind is _P.VAR_POSITIONAL
    return signature if keeps else signature.replace(parameters=parameters[1:])


def _require_buildable(spec: HookSpec, reference: str, found: type) -> None:
    """A class that stands for a function is built with `args` or with nothing, and called."""
    if not any("__call__" in vars(base) for base in found.__mro__):
        raise _refuse(spec, reference, "is a class without __call__; miles builds it once and then calls it")
    signature = _signature(found)
    if signature is None:
        return
    problems = []
    for arguments in ([None], []):
        try:
            signature.bind(*arguments)
        except TypeError as error:
            problems.append(str(error))
    if len(problems) == 2:  # noqa: PLR2004  neither way fits
        shown = f"{found.__qualname__}{signature}"
        raise _refuse(spec, reference, f"is built as cls(args) or cls(), it declares {shown}: {problems[0]}")


def _require_fit(
    spec: HookSpec,
    reference: str,
    found: Any,
    candidates: list[tuple[Form, inspect.Signature | None]],
    abi: HookAbi,
) -> Fit:
    fits: list[Fit] = []
    problems: list[str] = []
    for form, signature in candidates:
        if signature is None:
            return Fit(form, checkable=False)
        try:
            fits.append(_bind(spec, form, signature, newer_keywords(spec, abi)))
        except TypeError as error:
            problems.append(str(error))
    if len(fits) > 1 and _catches_all(candidates[0][1]):
        fits = fits[:1]
    if len(fits) == 1:
        return fits[0]
    name = getattr(found, "__qualname__", type(found).__name__)
    calls = "\n           or: ".join(f"{spec.name}{_shown(form.signature)}" for form, _ in candidates)
    problem = " / ".join(problems) if not fits else f"it fits {len(fits)} forms; give its parameters the stub's count"
    raise _refuse(
        spec,
        reference,
        f"does not fit\n  miles calls: {calls}\n  it declares: {name}{candidates[0][1]}\n  problem:     {problem}"
        + (f"\n  versions:    miles calls by ABI {shown(ABI)}, it was written for {abi}" if abi.version != ABI else ""),
    )


def _bind(spec: HookSpec, form: Form, theirs: inspect.Signature, withheld: frozenset[str]) -> Fit:
    """Bind the call that Miles makes; raises `TypeError` where it does not fit."""
    by_name = form.named(spec.by_keyword)
    ours = [p for p in form.signature.parameters.values() if p.name != "self" and p.kind not in _VARIADIC]
    positional = [None for p in ours if p.name not in by_name]
    takes_any_keyword = any(p.kind is _P.VAR_KEYWORD for p in theirs.parameters.values())
    named = frozenset(name for name in by_name - withheld if _takes_name(theirs, name))
    # A newer keyword goes into **kwargs, unless a parameter of the hook's own has its name.
    clashing = {name for name in withheld if _takes_name(theirs, name)}
    accepted = frozenset(by_name - clashing) if takes_any_keyword else named
    if spec.by_keyword and not accepted:
        raise TypeError("takes none of the arguments")
    theirs.bind(*positional, **dict.fromkeys(accepted))
    every = takes_any_keyword and not clashing
    kinds = {p.kind for p in theirs.parameters.values()}
    bare = bool(kinds) and kinds <= set(_VARIADIC)
    return Fit(form, None if every else accepted, named=named, checkable=not bare)


def _takes_name(signature: inspect.Signature, name: str) -> bool:
    parameter = signature.parameters.get(name)
    return parameter is not None and parameter.kind in (_P.POSITIONAL_OR_KEYWORD, _P.KEYWORD_ONLY)


def _catches_all(signature: inspect.Signature | None) -> bool:
    return signature is not None and any(p.kind is _P.VAR_POSITIONAL for p in signature.parameters.values())


def _shown(signature: inspect.Signature) -> str:
    parameters = [p.replace(annotation=_P.empty) for p in signature.parameters.values() if p.name != "self"]
    return str(inspect.Signature(parameters))


def _require_methods(spec: HookSpec, reference: str, found: type, form: Form) -> None:
    """Require every method of the stub; `__call__` must be the class's own, since every class can be called."""
    stubs = [base for base in form.stub.__mro__ if base.__module__.startswith("miles_api.")]
    methods = {name: value for base in stubs[::-1] for name, value in vars(base).items() if inspect.isfunction(value)}
    wanted = {name: stub for name, stub in methods.items() if name == "__call__" or not name.startswith("_")}
    has = {name for base in found.__mro__ if base is not object for name in vars(base)}
    if wanted.keys() - has:
        raise _refuse(
            spec, reference, f"lacks {', '.join(sorted(wanted.keys() - has))}; the {spec.name} class has them"
        )
    for name, stub in wanted.items():
        _require_method(spec, reference, found, name, stub)


def _require_method(spec: HookSpec, reference: str, cls: type, name: str, stub: Any) -> None:
    """Require that a method can be called as the stub's, by position, and is awaited where that is."""
    method = getattr(cls, name)
    if not callable(method):
        # A property says only of an instance what it gives.
        if hasattr(method, "__get__"):
            return
        raise _refuse(spec, reference, f"does not fit: its {name} is a {type(method).__name__}, not a method")
    _require_no_generator(spec, reference, _called(method), f"does not fit: its {name} ")
    ours, theirs = inspect.signature(stub), _without_self(cls, name)
    try:
        if theirs is not None:
            theirs.bind(*[None] * (len(ours.parameters) - 1))
    except TypeError as error:
        raise _refuse(
            spec,
            reference,
            f"does not fit\n  miles calls: {spec.name}.{name}{_shown(ours)}\n"
            f"  it declares: {cls.__qualname__}.{name}{theirs}\n  problem:     {error}",
        ) from error
    _require_color(spec, reference, inspect.iscoroutinefunction(stub), is_async(method), name)


def _require_color(spec: HookSpec, reference: str, wanted: bool, awaits: bool, method: str = "") -> None:
    """Refuse `async def` where Miles calls synchronously, and `def` where it awaits."""
    if not spec.either_color and wanted != awaits:
        right, got = ("async def", "def") if wanted else ("def", "async def")
        whose = f"does not fit: its {method} " if method else ""
        raise _refuse(spec, reference, f"{whose}must be `{right}`, it is `{got}`")
