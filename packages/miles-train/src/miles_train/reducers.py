"""Reducers: from one value a response token to one number for the micro-batch.

A token adds mask / divisor times its value. The divisor is the mask sum of the token's rollout (default), a constant
(--loss-length-norm) or 1 (--calculate-per-token-loss); the trainer divides what comes out by the rollouts, or with the
latter by the mask sum, of the whole optimizer step.
"""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from miles_train.options import ObjectiveOptions

__all__ = ["mask_weights", "reducer_of", "segment_ids", "segment_sums", "sum_of_sample_mean"]


def segment_ids(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return, for each of `sum(lengths)` concatenated tokens, the position of its sample (int64)."""
    counts = torch.tensor(lengths, dtype=torch.int64, device=device)
    return torch.repeat_interleave(counts, output_size=sum(lengths))


def segment_sums(values_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the sum over each sample's tokens, shape (B,); an empty sample sums to 0."""
    ids_R = segment_ids(lengths, values_R.device)
    return values_R.new_zeros(len(lengths)).index_add_(0, ids_R, values_R)


def sum_of_sample_mean(
    total_lengths: Sequence[int],  # noqa: ARG001  part of the reducer contract
    response_lengths: Sequence[int],
    loss_masks: Sequence[Tensor],
    calculate_per_token_loss: bool = False,
) -> Callable[[Tensor], Tensor]:
    """Return a function from the samples' concatenated token values (R,) to their sum of masked means.

    Called once a micro-batch. The trainer divides the result by the number of rollouts of the whole optimizer step, so
    that the gradient does not depend on how the step is split into micro-batches and ranks. With
    `calculate_per_token_loss` it is the plain masked sum, which the trainer divides by the step's mask sum. Samples
    without an unmasked token add 0, whatever their values are.
    """
    mask_R = torch.cat(list(loss_masks))
    if calculate_per_token_loss:
        return _weighted_sum(mask_R, mask_R)
    ids_R = segment_ids(response_lengths, mask_R.device)
    sums_B = mask_R.new_zeros(len(response_lengths)).index_add_(0, ids_R, mask_R)
    return _weighted_sum(mask_R, mask_R / sums_B.clamp_(min=1.0).index_select(0, ids_R))


def reducer_of(batch: dict[str, Any], objective: ObjectiveOptions) -> Callable[[Tensor], Tensor]:
    """Return a function from the samples' concatenated token values (R,) to what the micro-batch adds to the step.

    Called once a micro-batch. Without --loss-length-norm and without samples fanned out of one rollout it is
    `sum_of_sample_mean`. Otherwise a sample's masked sum is divided by the constant, or by the mask sum of all samples
    of its rollout, in whatever micro-batch and on whatever rank they are (the column `rollout_mask_sums`).
    """
    norm, per_token = objective.loss_length_norm, objective.calculate_per_token_loss
    if norm is None and (per_token or "rollout_mask_sums" not in batch):
        return sum_of_sample_mean(batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], per_token)
    mask_R = torch.cat(batch["loss_masks"])
    if norm is not None:
        return _weighted_sum(mask_R, mask_R / norm)
    divisors_B = mask_R.new_tensor(batch["rollout_mask_sums"]).clamp_(min=1.0)
    return _weighted_sum(mask_R, mask_R / divisors_B[segment_ids(batch["response_lengths"], mask_R.device)])


def mask_weights(rollout_data: dict[str, Any], mask_sums: Sequence[float], objective: ObjectiveOptions) -> list[float]:
    """Return for each sample what `reducer_of` makes of values that are all 1: what means are divided by.

    `mask_sums` has each sample's own mask sum.
    """
    if objective.calculate_per_token_loss:
        return list(mask_sums)
    if objective.loss_length_norm is not None:
        return [own / objective.loss_length_norm for own in mask_sums]
    rollouts = rollout_data.get("rollout_mask_sums", mask_sums)
    return [own / max(whole, 1.0) for own, whole in zip(mask_sums, rollouts, strict=True)]


def _weighted_sum(mask_R: Tensor, weights_R: Tensor) -> Callable[[Tensor], Tensor]:
    kept_R = mask_R != 0

    def reduce(values_R: Tensor) -> Tensor:
        return (torch.where(kept_R, values_R, 0.0) * weights_R).sum()

    return reduce
