"""IcePop: tokens on which trainer and engine disagree too much leave the loss, others are weighted by their ratio.

"Every Step Evolves: Scaling Reinforcement Learning for Trillion-Scale Thinking Model" (Ling Team 2025, arXiv
2510.18855), made for mixtures of experts, where the two may route a token to different experts: M(k) = k for
alpha ≤ k ≤ beta, else 0, with k the ratio of the trainer's to the engine's probability.
"""

# ruff: noqa: N806  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import torch
from torch import Tensor

from miles_hooks_contrib.segments import Segments

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["IcepopOptions", "icepop"]


class IcepopOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which tokens stay."""

    icepop_alpha: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    """Smallest ratio of the trainer's to the engine's probability with which a token stays in the loss."""
    icepop_beta: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """Largest ratio with which a token stays in the loss."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a range that is empty."""
        if not self.icepop_alpha < self.icepop_beta:
            raise ValueError(f"--icepop-alpha {self.icepop_alpha:g} is not below --icepop-beta {self.icepop_beta:g}")


def icepop(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Mask tokens whose ratio is outside of --icepop-alpha and --icepop-beta, weigh the others by it.

    The `importance_weights` hook `icepop`, called as its stub says. Metrics: `icepop_ratio`, and `icepop_low` and
    `icepop_high`, 1 where a token was masked for it.
    """
    segments = Segments(loss_masks)
    gap_R = segments.only(torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).detach()
    ratio_R = segments.ratios(gap_R, "token")
    low_R, high_R = ratio_R < args.icepop_alpha, ratio_R > args.icepop_beta
    masks_R = segments.mask_R * ~(low_R | high_R)
    metrics = {"icepop_ratio": ratio_R, "icepop_low": low_R.float(), "icepop_high": high_R.float()}
    return pg_loss * ratio_R, segments.split(masks_R), metrics


icepop.options = IcepopOptions  # type: ignore[attr-defined]
