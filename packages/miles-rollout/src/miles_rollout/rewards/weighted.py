"""Several rewards added up, each with its weight: `--rm-weights`."""

from __future__ import annotations

import math
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError, HookResultError, did_you_mean
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import HookSet
from miles_api.loading.load import entry_points
from miles_api.loading.plain import plain_number
from miles_rollout.failures import Guard, named
from miles_rollout.group import gather
from miles_rollout.rewards.dispatch import KINDS, check_rm_type, score_by
from miles_rollout.rewards.remote import close_remote

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample

__all__ = ["NAME", "TOTAL", "Weighted", "check_weights", "is_kind", "part_name", "resolve_parts", "shown_weights"]

NAME = "weighted"
"""The short name of the reward hook that `--rm-weights` stands for."""
TOTAL = "reward"
"""The entry of the dict reward that holds the weighted sum."""


class Weighted:
    """The reward hook `weighted`, built once: scores the parts of `--rm-weights` concurrently and adds them up.

    The reward is a dict: `reward`, the weighted sum, then each part as it was scored, by its name. A part fails as a
    reward hook does, and with it the whole score.
    """

    bounds_its_parts = True
    """--hook-timeout is for each part, as for a reward hook alone; built-in kinds have deadlines of their own."""

    def __init__(self, args: Args) -> None:
        check_weights(args.rm_weights)
        self._weights: dict[str, float] = dict(args.rm_weights)
        self._guard = Guard(args)
        self._hooks = {part: _hook_set(args, part) for part in self._weights if not is_kind(part)}

    async def __call__(self, args: Args, sample: Sample) -> dict[str, float]:
        """Return the weighted sum as `reward`, and each part by its name."""
        values = await gather(*(self._part(args, sample, part) for part in self._weights))
        total = math.fsum(weight * value for weight, value in zip(self._weights.values(), values, strict=True))
        return {TOTAL: total, **dict(zip(map(part_name, self._weights), values, strict=True))}

    async def _part(self, args: Args, sample: Sample, part: str) -> float:
        hooks = self._hooks.get(part)
        if hooks is None:
            value: Any = await score_by(part, args, sample)
            # A server may say more than its score.
            return _reward_of(value, part, sample) if isinstance(value, dict) else value
        hook = hooks.need("reward")
        value = await self._guard.once(hook, args, sample)
        return plain_number(value, named(hook), f"a part of the reward of sample {sample.index}")

    def report_parts(self) -> list[dict[str, Any]]:
        """Say which hooks the parts are, for `hooks.json`."""
        return [{**line, "part_of": NAME} for hooks in self._hooks.values() for line in hooks.report()]

    async def aclose(self) -> None:
        """Close the parts that can be closed, the connections to a reward server, and the threads."""
        async with AsyncExitStack() as closing:
            closing.callback(self._guard.close)
            closing.push_async_callback(close_remote)
            for hooks in self._hooks.values():
                closing.push_async_callback(hooks.aclose)


def is_kind(part: str) -> bool:
    """Say whether a key of `--rm-weights` is a built-in kind; the others are references of reward hooks."""
    return part.removeprefix("boxed_") in KINDS


def part_name(part: str) -> str:
    """Return the name that a part is reported by: a kind's or a short name itself, else the function's."""
    return part.rpartition(":")[2].rpartition(".")[2]


def shown_weights(weights: Mapping[str, float]) -> str:
    """Return the sum in words, for the plan."""
    return " + ".join(f"{weight:g} × {part_name(part)}" for part, weight in weights.items())


def check_weights(weights: Mapping[str, float]) -> None:
    """Raise `ConfigError` unless `weights` are finite, by parts that exist and are told apart by their names."""
    if not weights:
        raise ConfigError(f"the reward hook {NAME} adds up --rm-weights, and none are set")
    seen: dict[str, str] = {TOTAL: "the weighted sum"}
    for part, weight in weights.items():
        name = part_name(part)
        if name in seen:
            raise ConfigError(f"--rm-weights {part!r} would be reported as {name!r}, as {seen[name]} is: rename it")
        seen[name] = f"{part!r}"
        if not math.isfinite(weight):
            raise ConfigError(f"--rm-weights {part!r} has the weight {weight}: expected a finite number")
        if is_kind(part):
            check_rm_type(part)
        else:
            _check_known(part)


def _check_known(part: str) -> None:
    """Raise `ConfigError` for a bare word that names no reward hook; other references are resolved."""
    if any(mark in part for mark in ".:/"):
        return
    short = [name for name in entry_points(str(REGISTRY["reward"].group)) if name != NAME]
    if part not in short:
        raise ConfigError(
            f"--rm-weights {part!r} is neither a built-in reward ({', '.join(KINDS)}, or boxed_ in front) nor an "
            f"installed reward hook ({', '.join(short) or 'none'}){did_you_mean(part, [*KINDS, *short])}"
        )


def resolve_parts(args: Args) -> list[BoundHook]:
    """Load and check the hooks among the parts, and build none; `ConfigError` says which does not load or fit."""
    found = []
    for part in args.rm_weights:
        if not is_kind(part):
            hook = _hook_set(args, part, build=False).need("reward")
            if getattr(hook.target, "options", None) is not None or hasattr(hook.target, "add_arguments"):
                raise ConfigError(
                    f"--rm-weights {part!r} brings options of its own, which only --custom-rm-path can give it"
                )
            found.append(hook)
    return found


def _hook_set(args: Args, part: str, *, build: bool = True) -> HookSet:
    view = args.fork()
    view.custom_rm_path, view.group_rm = part, False
    try:
        return HookSet(view, ["reward"], build=build)
    except ConfigError as error:
        raise ConfigError(f"--rm-weights: {error}") from error


def _reward_of(value: dict[str, float], part: str, sample: Sample) -> float:
    if TOTAL not in value:
        raise HookResultError(
            f"{part} gave sample {sample.index} the scores {sorted(value)}: a part of --rm-weights is one number, or "
            f"the {TOTAL!r} among them"
        )
    return value[TOTAL]
