"""Samples fanned out of one rollout: told by `rollout_ids`, counted once."""

# ruff: noqa: N806  the shape suffix: R response tokens of the rank

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from miles_train.reducers import segment_sums

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

__all__ = ["FIRSTS", "MASK_SUMS", "NUMBERS", "number_rollouts", "sum_rollout_masks"]

NUMBERS = "rollout_numbers"
"""The column that numbers the rollouts of all ranks, in order of their first samples."""
FIRSTS = "rollout_firsts"
"""The column that is 1 for the first sample of a rollout and 0 for others: what counts rollouts."""
MASK_SUMS = "rollout_mask_sums"
"""The column that has, for each sample, the mask sum of all samples of its rollout."""


def number_rollouts(columns: dict[str, Any]) -> dict[str, Any]:
    """Return the columns with `rollout_numbers` and `rollout_firsts` if any rollout has several samples, else the very
    same columns: then every sample is a rollout.

    Called once a rollout on each rank with the columns of all ranks, before they are shared out. A rollout is told by
    its `rollout_ids` within its `group_indices`; without `rollout_ids` each sample is one.
    """
    ids = columns.get("rollout_ids", ())
    if len(set(ids)) == len(ids):
        return columns
    numbers: dict[Hashable, int] = {}
    numbered, firsts = [], []
    for key in zip(columns.get("group_indices", [0] * len(ids)), ids, strict=True):
        firsts.append(int(key not in numbers))
        numbered.append(numbers.setdefault(key, len(numbers)))
    return columns if all(firsts) else columns | {NUMBERS: numbered, FIRSTS: firsts}


def sum_rollout_masks(
    rollout_data: dict[str, Any], sum_over_ranks: Callable[[list[list[float]]], list[list[float]]]
) -> None:
    """Set the column `rollout_mask_sums` if any rollout has several samples.

    Called once a rollout, when loss masks are final. `sum_over_ranks` adds up a matrix over the data-parallel ranks: a
    rollout's samples may lie on several. All ranks have numbered rollouts, or none has.
    """
    if NUMBERS not in rollout_data:
        return
    numbers = rollout_data[NUMBERS]
    [[count]] = sum_over_ranks([[float(sum(rollout_data[FIRSTS]))]])
    mask_R = torch.cat(rollout_data["loss_masks"]).double()
    own = segment_sums(mask_R, rollout_data["response_lengths"]).tolist()
    sums = [0.0] * int(count)
    for number, mask_sum in zip(numbers, own, strict=True):
        sums[number] += mask_sum
    [sums] = sum_over_ranks([sums])
    rollout_data[MASK_SUMS] = [sums[number] for number in numbers]
