"""Samples fanned out of one rollout: told by `rollout_ids`, counted once."""

# ruff: noqa: N806  the shape suffix: R response tokens of the rank

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from miles_train.reducers import segment_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

__all__ = ["MASK_SUMS", "Siblings", "number_rollouts", "sum_rollout_masks"]

MASK_SUMS = "rollout_mask_sums"
"""The column that has, for each sample, the mask sum of all samples of its rollout; added after all hooks that may
change columns."""


class Siblings(NamedTuple):
    """Which rollout each sample is of. It is no column, so that no hook can drop it or put it into another order."""

    numbers: list[int]
    """The number of each sample's rollout; those of all ranks are numbered in order of their first samples."""
    firsts: list[int]
    """1 for the first sample of a rollout and 0 for others: what counts rollouts."""
    count: int
    """The rollouts of all ranks."""

    def of(self, positions: Iterable[int]) -> Siblings:
        """Return the same for some samples only, in the order of `positions`."""
        numbers, firsts = zip(*((self.numbers[i], self.firsts[i]) for i in positions), strict=True)
        return Siblings(list(numbers), list(firsts), self.count)


def number_rollouts(columns: dict[str, Any]) -> Siblings | None:
    """Return which samples share a rollout; None where none do: then every sample is a rollout.

    Called once a rollout on each rank with the columns of all ranks, before they are shared out. A rollout is told by
    its `rollout_ids` within its `group_indices`; without `rollout_ids` each sample is one.
    """
    ids = columns.get("rollout_ids", ())
    if len(set(ids)) == len(ids):
        return None
    numbers: dict[Hashable, int] = {}
    numbered, firsts = [], []
    for key in zip(columns.get("group_indices", [0] * len(ids)), ids, strict=True):
        firsts.append(int(key not in numbers))
        numbered.append(numbers.setdefault(key, len(numbers)))
    return None if all(firsts) else Siblings(numbered, firsts, len(numbers))


def sum_rollout_masks(
    rollout_data: dict[str, Any],
    siblings: Siblings | None,
    sum_over_ranks: Callable[[list[list[float]]], list[list[float]]],
) -> None:
    """Set the column `rollout_mask_sums` if any rollout has several samples.

    Called once a rollout, when loss masks are final. `siblings` are of this rank's samples; `sum_over_ranks` adds up a
    matrix over the data-parallel ranks: a rollout's samples may lie on several. All ranks have siblings, or none has.
    """
    if siblings is None:
        return
    mask_R = torch.cat(rollout_data["loss_masks"]).double()
    own = segment_sums(mask_R, rollout_data["response_lengths"]).tolist()
    sums = [0.0] * siblings.count
    for number, mask_sum in zip(siblings.numbers, own, strict=True):
        sums[number] += mask_sum
    [sums] = sum_over_ranks([sums])
    rollout_data[MASK_SUMS] = [sums[number] for number in siblings.numbers]
