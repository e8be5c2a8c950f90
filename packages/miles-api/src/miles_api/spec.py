"""`@hook`: from one stub follow the flag, the check of user code, the docs, the ABI line and the entry-point group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec

from miles_api.abi import Version

__all__ = ["REGISTRY", "Deprecation", "Form", "HookSpec", "Moment", "hook", "second_form"]

Stub = TypeVar("Stub", bound=Callable[..., Any])
Side = Literal["rollout", "train", "router"]
Kind = Literal["function", "class", "value"]
Moment = Literal["start", "rollout", "eval", "save", "sometimes"]


class Form(msgspec.Struct, frozen=True):
    """One way in which a hook may be written."""

    name: str
    stub: Any
    signature: inspect.Signature
    is_async: bool

    def named(self, by_keyword: bool = False) -> set[str]:
        """Return the parameters that Miles passes by name: the keyword-only ones, or all with `by_keyword`."""
        unnamed = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        return {
            name
            for name, parameter in self.signature.parameters.items()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            or (by_keyword and name != "self" and parameter.kind not in unnamed)
        }


class Deprecation(msgspec.Struct, frozen=True):
    """Something that the next major ABI will not have."""

    since: str
    """The ABI that deprecated it: `1.3`."""
    instead: str
    """What to do instead: `use reward`."""

    @classmethod
    def of(cls, text: str) -> Deprecation:
        """Read `1.3: use reward`; both parts are required."""
        since, _, instead = (part.strip() for part in text.partition(":"))
        if not (all(part.isdigit() for part in since.split(".")) and instead):
            raise ValueError(f"{text!r} does not read as `1.3: what to use instead`")
        return cls(since, instead)

    def __str__(self) -> str:
        return f"since {self.since}: {self.instead}"


class HookSpec(msgspec.Struct, kw_only=True):
    """Everything Miles knows about one hook; derived from its stub."""

    name: str
    flag: str | None
    """None for a hook that is found beside another one."""
    needs: str | None
    """The switch that turns this hook's flag from its first meaning to this one: `--group-rm`."""
    stage: str
    side: Side
    since: Version
    kind: Kind
    many: bool
    """True where the flag takes several references, called in order."""
    by_keyword: bool
    """True where all arguments are passed by keyword."""
    either_color: bool
    """True where both `def` and `async def` are accepted."""
    forms: list[Form]
    default: str
    """What runs without the flag, in words."""
    moment: Moment
    """When a run must have called it: once at the start, in every rollout, with each evaluation or checkpoint. A
    configured hook that was not called by then is an error; `sometimes` demands nothing."""
    shares: str | None = None
    """The hook with which it shares its instance and its `args` where both name the same reference."""
    added: dict[str, Version] = {}
    """The ABI that each keyword came with, where that is later than the hook's own."""
    deprecated: Deprecation | None = None
    deprecated_arguments: dict[str, Deprecation] = {}
    """By keyword."""

    @property
    def field(self) -> str | None:
        """The option's name: `custom_rm_path`."""
        return self.flag and self.flag.removeprefix("--").replace("-", "_")

    @property
    def group(self) -> str:
        """The entry-point group of implementations with a short name."""
        return f"miles.hooks.{self.name}"

    @property
    def doc(self) -> str:
        return inspect.cleandoc(self.forms[0].stub.__doc__ or "")


REGISTRY: dict[str, HookSpec] = {}


def hook(  # noqa: PLR0913  a declaration names everything
    *,
    flag: str | None,
    since: Version,
    side: Side,
    default: str,
    moment: Moment,
    name: str | None = None,
    needs: str | None = None,
    kind: Kind = "function",
    many: bool = False,
    by_keyword: bool = False,
    either_color: bool = False,
    shares: str | None = None,
    added: dict[str, Version] | None = None,
    deprecated: str | None = None,
    deprecated_arguments: dict[str, str] | None = None,
) -> Callable[[Stub], Stub]:
    """Declare a hook by its stub: a function, or a Protocol class for hooks that are classes.

    Keyword-only parameters of the stub may be left out by an implementation; all others must be taken. A keyword that
    came after the hook is named in `added` with its ABI: `added={"budget": (1, 1)}`. What the next major will not have
    is named in `deprecated="1.3: use reward"` or `deprecated_arguments={"budget": "1.3: use limit"}`. A `ValueError` at
    import says what is wrong with a declaration.
    """

    def declare(stub: Stub) -> Stub:
        hook_name = name or stub.__name__
        taken = {(other.flag, other.needs) for other in REGISTRY.values() if other.flag}
        if hook_name in REGISTRY or (flag, needs) in taken:
            raise ValueError(f"hook {hook_name} ({flag}) is declared twice")
        form = _form("plain", stub)
        unknown = {*(added or {}), *(deprecated_arguments or {})} - form.named(by_keyword)
        if unknown:
            raise ValueError(f"hook {hook_name} passes no keyword {', '.join(sorted(unknown))}")
        REGISTRY[hook_name] = HookSpec(
            name=hook_name, flag=flag, needs=needs, stage=stub.__module__.rsplit(".", 1)[-1], side=side, since=since,
            kind=kind, many=many, by_keyword=by_keyword, either_color=either_color, default=default, moment=moment,
            forms=[form], shares=shares, added=added or {},
            deprecated=Deprecation.of(deprecated) if deprecated else None,
            deprecated_arguments={key: Deprecation.of(text) for key, text in (deprecated_arguments or {}).items()},
        )  # fmt: skip
        return stub

    return declare


def second_form(of: str, *, name: str) -> Callable[[Stub], Stub]:
    """Declare another way of writing hook `of`; implementations are told apart by binding."""

    def declare(stub: Stub) -> Stub:
        REGISTRY[of].forms.append(_form(name, stub))
        return stub

    return declare


def _form(name: str, stub: Any) -> Form:
    signature = inspect.signature(stub.__init__ if isinstance(stub, type) else stub)
    return Form(name, stub, signature, inspect.iscoroutinefunction(stub))
