"""Truncated importance sampling (Ionides 2008, doi 10.1198/106186008X320456): a token's loss is weighted by the ratio
of the trainer's to the engine's probability, cut off so that a few tokens cannot dominate the gradient."""

# ruff: noqa: N806  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["truncated_importance_sampling"]


def truncated_importance_sampling(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Weight each token's loss by `exp(train - rollout log-prob)`, kept between `tis_clip_low` and `tis_clip`.

    The default of `--custom-tis-function-path`, called as that hook is. Masks stay as they are. Metrics: `tis`, the
    ratio; `tis_clipfrac`, 1 where it was cut off; `tis_abs`, its distance from 1.
    """
    mask_R = torch.cat(loss_masks) != 0
    gap_R = torch.cat(train_log_probs) - torch.cat(rollout_log_probs)
    # Masked tokens (a tool's output, say) may hold any log-prob of the engine: exp of it could overflow.
    ratio_R = torch.where(mask_R, gap_R, 0.0).exp()
    weights_R = ratio_R.clamp(args.tis_clip_low, args.tis_clip)
    metrics = {
        "tis": ratio_R,
        "tis_clipfrac": (weights_R != ratio_R).float(),
        "tis_abs": (ratio_R - 1).abs(),
    }
    return pg_loss * weights_R, loss_masks, metrics
