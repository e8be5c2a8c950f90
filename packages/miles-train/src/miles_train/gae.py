"""Sums over what follows a token, vectorised over samples of any length: returns, and advantages from a critic."""

# ruff: noqa: N803, N806  the shape suffixes
# R response tokens of the rank's samples, K those of them that are unmasked

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miles_train.reducers import segment_ids, segment_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["generalized_advantages", "sums_to_go", "tokens_after"]


def tokens_after(kept_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return how many unmasked tokens of the same sample follow each token (int64)."""
    ends_B = segment_sums(kept_R.long(), lengths).cumsum(0)
    return ends_B[segment_ids(lengths, kept_R.device)] - kept_R.long().cumsum(0)


def sums_to_go(values_R: Tensor, kept_R: Tensor, lengths: Sequence[int], discount: float) -> Tensor:
    """Return for each unmasked token the sum over it and the unmasked tokens after it in its sample, each weighted by
    `discount` to the power of the unmasked tokens from the one to the other; 0 for masked tokens; fp64."""
    sums_R = torch.zeros_like(values_R, dtype=torch.float64)
    sums_R[kept_R] = _scan(values_R[kept_R].double(), tokens_after(kept_R, lengths)[kept_R], discount)
    return sums_R


def generalized_advantages(
    rewards_R: Tensor, values_R: Tensor, kept_R: Tensor, lengths: Sequence[int], *, gamma: float, lambd: float
) -> tuple[Tensor, Tensor]:
    """Return advantages (GAE, arXiv 1506.02438) and returns, which are advantages + values, in fp64.

    Masked tokens take no time: the token after an unmasked one is the next unmasked one of the sample, and after the
    last the value is 0. They get advantage 0 and their own value as return.
    """
    after_K = tokens_after(kept_R, lengths)[kept_R]
    rewards_K, values_K = rewards_R[kept_R].double(), values_R[kept_R].double()
    next_K = torch.where(after_K > 0, values_K.roll(-1), 0.0)
    advantages_R = torch.zeros_like(values_R, dtype=torch.float64)
    advantages_R[kept_R] = _scan(rewards_K + gamma * next_K - values_K, after_K, gamma * lambd)
    return advantages_R, advantages_R + values_R


def _scan(values_K: Tensor, after_K: Tensor, discount: float) -> Tensor:
    """Return the discounted sum of each value and the `after_K` that follow it, doubling the reach in each pass."""
    sums_K = values_K.clone()
    reach, longest = 1, int(after_K.max()) + 1 if len(after_K) else 0
    while reach < longest and discount**reach > 0:
        later_K = torch.where(after_K[:-reach] >= reach, sums_K[reach:], 0.0)
        sums_K[:-reach] += discount**reach * later_K
        reach *= 2
    return sums_K
