"""Truncated importance sampling: weigh each token by how much likelier the trainer finds it than the engine did.

Ionides 2008 (doi 10.1198/106186008X320456); for the gap between trainer and engine: "Your Efficient RL Framework
Secretly Brings You Off-Policy RL Training" (Yao et al. 2025, fengyao.notion.site). `--use-tis` alone gives the same
weights: this file is that default as a hook, short enough to copy and change.
"""

# ruff: noqa: N806  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_hooks_contrib.segments import SAFETY_BOUND

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["tis"]


def tis(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Weigh each token's loss by its importance ratio, kept between --tis-clip-low and --tis-clip.

    The `importance_weights` hook `tis`, called as its stub says. Metrics: `tis`, the ratio; `tis_clipfrac`, 1 where it
    was cut off; `tis_abs`, its distance from 1.
    """
    kept_R = torch.cat(loss_masks) != 0
    # Masked tokens, a tool's output say, may hold anything; exp of it could overflow.
    log_ratio_R = torch.where(kept_R, torch.cat(train_log_probs) - torch.cat(rollout_log_probs), 0.0).detach()
    ratio_R = log_ratio_R.clamp(-SAFETY_BOUND, SAFETY_BOUND).exp()
    weights_R = ratio_R.clamp(args.tis_clip_low, args.tis_clip)
    metrics = {"tis": ratio_R, "tis_clipfrac": (weights_R != ratio_R).float(), "tis_abs": (ratio_R - 1.0).abs()}
    return pg_loss * weights_R, loss_masks, metrics
