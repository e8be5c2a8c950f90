"""`@hook`: from one stub follow the flag, the check of user code, the docs, the ABI line and the entry-point group."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import msgspec

__all__ = ["REGISTRY", "Form", "HookSpec", "Moment", "hook", "second_form"]

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


class HookSpec(msgspec.Struct, kw_only=True):
    """Everything Miles knows about one hook; derived from its stub."""

    name: str
    flag: str | None
    """None for a hook that is found beside another one."""
    needs: str | None
    """The switch that turns this hook's flag from its first meaning to this one: `--group-rm`."""
    stage: str
    side: Side
    since: tuple[int, int]
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
    since: tuple[int, int],
    side: Side,
    default: str,
    moment: Moment,
    name: str | None = None,
    needs: str | None = None,
    kind: Kind = "function",
    many: bool = False,
    by_keyword: bool = False,
    either_color: bool = False,
) -> Callable[[Stub], Stub]:
    """Declare a hook by its stub: a function, or a Protocol class for hooks that are classes.

    Keyword-only parameters of the stub may be left out by an implementation; all others must be taken.
    """

    def declare(stub: Stub) -> Stub:
        hook_name = name or stub.__name__
        taken = {(other.flag, other.needs) for other in REGISTRY.values() if other.flag}
        if hook_name in REGISTRY or (flag, needs) in taken:
            raise ValueError(f"hook {hook_name} ({flag}) is declared twice")
        REGISTRY[hook_name] = HookSpec(
            name=hook_name, flag=flag, needs=needs, stage=stub.__module__.rsplit(".", 1)[-1], side=side, since=since,
            kind=kind, many=many, by_keyword=by_keyword, either_color=either_color, default=default, moment=moment,
            forms=[_form("plain", stub)],
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
