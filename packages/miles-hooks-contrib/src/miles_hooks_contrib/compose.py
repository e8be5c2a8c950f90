"""Several rewards as one: their sum, product, least or greatest, each part with options of its own.

    sum  Σ w_i r_i      product  Π w_i r_i      min  min_i w_i r_i      max  max_i w_i r_i

`--rm-weights` adds rewards up, reports every part, and scores them at the same time: use it where it does. This is for
what it cannot do: a gate (a product stops at the first 0, so that a cheap check of the format saves the judge behind
it), the worst or best of several, and parts that bring options, which `--compose-options` gives them.
"""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from miles_api.args import Args
from miles_api.errors import ConfigError, HookError, HookResultError, did_you_mean
from miles_api.loading.hookset import HookSet
from miles_api.loading.load import entry_points, import_reference
from miles_api.loading.plain import plain_number
from miles_api.options import References

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample

__all__ = ["Compose", "ComposeOptions"]

_SHORT_NAMES = "miles.hooks.reward"
_TOTAL = "reward"


class ComposeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which rewards are put together, and how."""

    compose_of: References
    """The parts, each with a factor: reward hooks as --custom-rm-path takes them, or kinds as --rm-type does. Scored
    in this order, one after the other."""
    compose_by: Literal["sum", "product", "min", "max"] = "product"
    """How the scores, each times its factor, become one. A product of 0 is not multiplied further."""
    compose_options: dict[str, dict[str, Any]] = {}
    """Options that parts bring, by the part's name, its short name or its function: {llm_judge = {judge_url = "…"}}."""


class Compose:
    """The reward hook: score a sample by its parts, and put the scores together."""

    options = ComposeOptions

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` for parts, factors or options that cannot work."""
        if not args.compose_of:
            raise ConfigError("--compose-of is empty: name at least one reward, such as {math = 1.0}")
        for part, factor in args.compose_of.items():
            if not math.isfinite(factor):
                raise ConfigError(f"--compose-of {part!r} has the factor {factor}: expected a finite number")
        names = [_name(part) for part in args.compose_of]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ConfigError(f"--compose-of has two parts named {twice.pop()!r}: rename one")
        for name in args.compose_options:
            if name not in names:
                raise ConfigError(f"--compose-options names {name!r}, no part{did_you_mean(name, names)}")
        self._product = args.compose_by == "product"
        self._join = {"sum": math.fsum, "product": math.prod, "min": min, "max": max}[args.compose_by]
        self._factors: dict[str, float] = dict(args.compose_of)
        self._hooks = {part: _hook_set(args, part, args.compose_options.get(_name(part), {})) for part in self._factors}

    async def __call__(self, args: Args, sample: Sample) -> float:
        """Return the score. Called once a sample, concurrently; fails as a part fails."""
        scores: list[float] = []
        for part, factor in self._factors.items():
            scores.append(factor * await self._score(self._hooks[part].need("reward"), part, sample))
            if self._product and scores[-1] == 0:
                return 0.0
        return self._join(scores)

    async def _score(self, hook: BoundHook, part: str, sample: Sample) -> float:
        value = await hook.acall(None, hook.view, sample)
        if isinstance(value, dict):
            if _TOTAL not in value:
                raise HookResultError(
                    f"{part} gave sample {sample.index} the scores {sorted(value)}: a part of --compose-of is one "
                    f"number, or the {_TOTAL!r} among them"
                )
            value = value[_TOTAL]
        return plain_number(value, f"{part}, a part of --compose-of,", f"the reward of sample {sample.index}")

    async def aclose(self) -> None:
        """Close the parts that can be closed."""
        async with AsyncExitStack() as closing:
            for hooks in self._hooks.values():
                closing.push_async_callback(hooks.aclose)


def _name(part: str) -> str:
    return part.rpartition(":")[2].rpartition(".")[2]


def _hook_set(args: Args, part: str, own: dict[str, Any]) -> HookSet:
    """Load one part, with its own view of the options; a kind is the default reward hook told of another kind."""
    shared = {name: getattr(args, name) for name in args}
    is_hook = any(mark in part for mark in ".:/") or part in entry_points(_SHORT_NAMES)
    named = {"custom_rm_path": part} if is_hook else {"custom_rm_path": None, "rm_type": part, "rm_weights": {}}
    try:
        brought = _own_options(part, own) if is_hook else _no_options(own)
        return HookSet(Args({**shared, **named, "group_rm": False, **brought}), ["reward"])
    except (ConfigError, HookError) as error:
        raise ConfigError(f"--compose-of {part!r}: {error}") from error


def _own_options(part: str, own: dict[str, Any]) -> dict[str, Any]:
    kind = getattr(import_reference(part, short_names=_SHORT_NAMES, flag="--compose-of"), "options", None)
    if kind is None:
        return _no_options(own)
    unknown = [name for name in own if name not in kind.__struct_fields__]
    if unknown:
        raise ConfigError(f"it has no option {unknown[0]!r}{did_you_mean(unknown[0], kind.__struct_fields__)}")
    try:
        return msgspec.structs.asdict(msgspec.convert(own, kind))
    except (msgspec.ValidationError, ValueError) as error:
        raise ConfigError(f"--compose-options: {error}") from error


def _no_options(own: dict[str, Any]) -> dict[str, Any]:
    if own:
        raise ConfigError(f"it brings no options, and --compose-options gives it {sorted(own)}")
    return {}
