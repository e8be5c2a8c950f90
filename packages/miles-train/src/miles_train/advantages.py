"""Advantages of response tokens from rewards, and their whitening over all data-parallel ranks."""

# ruff: noqa: N803, N806  the shape suffixes
# B samples of the rank, R response tokens of them

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles_train.reducers import segment_ids, segment_sums

if TYPE_CHECKING:
    from torch import Tensor

    from miles_train.estimators import Estimator
    from miles_train.parallel import Group

__all__ = ["set_advantages", "whiten_advantages"]

_LEAST_VARIANCE = 1e-8


def set_advantages(rollout_data: dict[str, Any], estimator: Estimator, gamma: float = 1.0) -> None:
    """Set `advantages` and `returns`: every response token of a sample gets its reward, less its baseline.

    Called once a rollout on each rank, after log-probs. `rewards` are as the rollout's reward post-processing left
    them: with grpo (arXiv 2402.03300) and gspo normalised within their groups. With an estimator that discounts
    (REINFORCE++, arXiv 2501.03262) a token's return is the reward times `gamma` to the power of the unmasked tokens
    after it: a tool's output takes no time. Both columns are lists of 1-D fp32 tensors of the response's length;
    masked tokens carry a value too, and the reducer leaves them out.
    """
    masks = rollout_data["loss_masks"]
    lengths = [len(mask) for mask in masks]
    rewards = rollout_data["rewards"]
    if estimator.baseline is not None:
        rewards = [reward - own for reward, own in zip(rewards, rollout_data["baselines"], strict=True)]
    device = masks[0].device
    returns_R = torch.tensor(rewards, dtype=torch.float64, device=device)[segment_ids(lengths, device)]
    if estimator.discounts and gamma != 1.0:
        returns_R *= torch.full_like(returns_R, gamma).pow(_actions_after(torch.cat(masks) != 0, lengths))
    returns_R = returns_R.float()
    rollout_data["advantages"] = list(returns_R.split(lengths))
    rollout_data["returns"] = list(returns_R.split(lengths))


def _actions_after(kept_R: Tensor, lengths: list[int]) -> Tensor:
    """Return how many unmasked tokens of the same sample follow each token."""
    ends_B = segment_sums(kept_R.long(), lengths).cumsum(0)
    return ends_B[segment_ids(lengths, kept_R.device)] - kept_R.long().cumsum(0)


def whiten_advantages(rollout_data: dict[str, Any], dp: Group) -> None:
    """Bring `advantages` to mean 0 and spread 1 over the unmasked tokens of the whole rollout; `returns` stay.

    Called once a rollout, after `rollout_data_postprocess` hooks, so that the masks they changed count; a collective of
    the data-parallel ranks `dp`. Advantages that are all equal become exactly 0, those of masked tokens too.
    """
    lengths = [len(values) for values in rollout_data["advantages"]]
    kept_R = torch.cat(rollout_data["loss_masks"]) != 0
    values_R = torch.where(kept_R, torch.cat(rollout_data["advantages"]).double(), 0.0)
    count, total = _sums_over_ranks(dp, kept_R.sum(), values_R.sum())
    # Sums of equal fp32 numbers are exact in fp64, so that equal advantages become 0 and not a rounding error.
    centred_R = torch.where(kept_R, values_R - total / max(count, 1.0), 0.0)
    [squares] = _sums_over_ranks(dp, centred_R.square().sum())
    scale = 1.0 / math.sqrt(squares / max(count, 1.0) + _LEAST_VARIANCE)
    rollout_data["advantages"] = list((centred_R * scale).float().split(lengths))


def _sums_over_ranks(dp: Group, *parts: Tensor) -> list[float]:
    """Return the sum of each scalar over the ranks: the very same number on all ranks of the model, which decide by
    it what runs."""
    mine = torch.stack([part.double() for part in parts])
    ranks = [mine]
    if dp.size > 1:
        ranks = [torch.empty_like(mine) for _ in range(dp.size)]
        dist.all_gather(ranks, mine, group=dp.group)
    # fsum rounds once, whatever the order.
    return [math.fsum(column) for column in torch.stack(ranks).T.tolist()]
