"""Every sample of a rollout belongs to a group and has a number."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from miles_api.rollout_types import Group
    from miles_api.sample import Sample

__all__ = ["require_identity"]

_FIELDS = ("group_index", "index", "rollout_id")


def require_identity(groups: list[Group], who: str) -> None:
    """Number samples by position where a hook built them without identity; a half-numbered rollout is an error.

    Raises `HookResultError` when only some samples have `group_index`, `index` or `rollout_id`, and when fan-outs have
    invented numbers that clash.
    """
    samples = flatten(groups)
    for field in _FIELDS:
        lacking = sum(getattr(sample, field) is None for sample in samples)
        if 0 < lacking < len(samples):
            raise HookResultError(f"{who} returned {lacking} of {len(samples)} samples without {field}")
    for field in [field for field in _FIELDS if getattr(samples[0], field) is None]:
        number = 0
        for position, group in enumerate(groups):
            for item in group:
                for sample in item if isinstance(item, list) else [item]:
                    setattr(sample, field, position if field == "group_index" else number)
                    # The samples fanned out of one generation share its rollout_id.
                    number += field == "index"
                number += field == "rollout_id"
    if any(isinstance(item, list) for group in groups for item in group):
        _require_apart(groups, who)


def _require_apart(groups: list[Group], who: str) -> None:
    """Refuse fan-outs with numbers that clash: trajectories would count as one, or be drawn with the same seeds.

    A rollout may hold a copy of a group, with the same numbers throughout.
    """
    taken: dict[tuple[str, int | None, int | None], tuple[int, int, tuple[Any, ...]]] = {}
    items = [(place, item) for place, group in enumerate(groups) for item in group]
    for number, (place, item) in enumerate(items):
        fan = item if isinstance(item, list) else [item]
        numbers = tuple(dict.fromkeys((sample.group_index, sample.index, sample.rollout_id) for sample in fan))
        _require_own_indices(fan, who)
        for group, index, rollout in numbers:
            for key in (("index", None, index), ("rollout_id", group, rollout)):
                other, its_place, its_numbers = taken.setdefault(key, (number, place, numbers))
                if other != number and (its_place == place or its_numbers != numbers):
                    raise HookResultError(
                        f"{who} returned two generations with {key[0]} {key[2]}, the second in group {group}: what a "
                        "generation fans out needs numbers that no other has, such as sample.index times the most it "
                        "fans out to, plus a position"
                    )


def _require_own_indices(fan: list[Sample], who: str) -> None:
    rollouts: dict[int | None, int | None] = {}
    for sample in fan:
        one = rollouts.setdefault(sample.index, sample.rollout_id)
        if one != sample.rollout_id:
            raise HookResultError(
                f"{who} returned one generation with index {sample.index} in its rollout_ids {one} and "
                f"{sample.rollout_id}: a trajectory of its own needs an index of its own"
            )
