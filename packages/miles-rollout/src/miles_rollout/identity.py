"""Every sample of a rollout belongs to a group and has a number: rewards are normalised by group."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import HookResultError
from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from miles_api.rollout_types import Group

__all__ = ["require_identity"]

_FIELDS = ("group_index", "index", "rollout_id")


def require_identity(groups: list[Group], who: str) -> None:
    """Number samples by position where a hook built them without identity; a half-numbered rollout is an error.

    Raises `HookResultError` when only some samples have `group_index`, `index` or `rollout_id`.
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
