"""Sequence-level masked importance sampling: one ratio for a whole response, which stays or leaves as a whole.

The product of its tokens' ratios is the ratio that makes the gradient unbiased ("When Speed Kills Stability", Liu, Li
et al. 2025, richardli.xyz/rl-collapse); its spread grows with the length. The geometric mean, which does not, is the
ratio of a response in GSPO ("Group Sequence Policy Optimization", Zheng et al. 2025, arXiv 2507.18071).
"""

# ruff: noqa: N806  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import torch
from torch import Tensor

from miles_hooks_contrib.segments import Segments

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["SeqMisOptions", "seq_mis"]


class SeqMisOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which responses stay."""

    seq_mis_level: Literal["sequence", "geometric"] = "sequence"
    """The ratio of a response: the product of its tokens' ratios, or their geometric mean as in GSPO, whose bounds
    must be much closer to 1."""
    seq_mis_upper_bound: Annotated[float, msgspec.Meta(gt=0)] = 2.0
    """Largest ratio with which a response stays in the loss."""
    seq_mis_lower_bound: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    """Smallest ratio with which a response stays in the loss; 0 bounds only from above."""

    def __post_init__(self) -> None:
        """Raise `ValueError` for a range that is empty."""
        low, high = self.seq_mis_lower_bound, self.seq_mis_upper_bound
        if not low < high:
            raise ValueError(f"--seq-mis-lower-bound {low:g} is not below --seq-mis-upper-bound {high:g}")


def seq_mis(
    args: Args,
    *,
    pg_loss: Tensor,
    train_log_probs: list[Tensor],
    rollout_log_probs: list[Tensor],
    loss_masks: list[Tensor],
    **_unused: Any,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Weigh each response by its ratio, and mask it where that is out of bounds.

    The `importance_weights` hook `seq_mis`, called as its stub says. Metrics: `seq_mis_ratio`, and `seq_mis_low` and
    `seq_mis_high`, 1 where a response was masked for it.
    """
    segments = Segments(loss_masks)
    gap_R = segments.only(torch.cat(train_log_probs) - torch.cat(rollout_log_probs)).detach()
    ratio_R = segments.ratios(gap_R, args.seq_mis_level)
    low_R, high_R = ratio_R < args.seq_mis_lower_bound, ratio_R > args.seq_mis_upper_bound
    masks_R = segments.mask_R * ~(low_R | high_R)
    metrics = {"seq_mis_ratio": ratio_R, "seq_mis_low": low_R.float(), "seq_mis_high": high_R.float()}
    return pg_loss * ratio_R, segments.split(masks_R), metrics


seq_mis.options = SeqMisOptions  # type: ignore[attr-defined]
