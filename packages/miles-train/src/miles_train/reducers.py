"""Reducers: from one value a response token to one number for the micro-batch."""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["segment_ids", "segment_sums", "sum_of_sample_mean"]


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

    Called once a micro-batch. The trainer divides the result by the number of samples of the whole optimizer step, so
    that the gradient does not depend on how the step is split into micro-batches and ranks. With
    `calculate_per_token_loss` it is the plain masked sum, which the trainer divides by the step's mask sum. Samples
    without an unmasked token add 0, whatever their values are.
    """
    mask_R = torch.cat(list(loss_masks))
    weights_R = mask_R
    if not calculate_per_token_loss:
        ids_R = segment_ids(response_lengths, mask_R.device)
        sums_B = mask_R.new_zeros(len(response_lengths)).index_add_(0, ids_R, mask_R)
        weights_R = mask_R / sums_B.clamp_(min=1.0).index_select(0, ids_R)
    kept_R = mask_R != 0

    def reduce(values_R: Tensor) -> Tensor:
        return (torch.where(kept_R, values_R, 0.0) * weights_R).sum()

    return reduce
