"""What an importance ratio and an advantage make of a token's loss: clipped (PPO), or clipped weights (CISPO)."""

# ruff: noqa: N803, N806, N815  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from miles_train.reducers import segment_ids, segment_sums

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_train.options import ObjectiveOptions

__all__ = ["Surrogate", "clipped", "clipped_weights", "sequence_log_ratios"]


class Surrogate(NamedTuple):
    """The policy loss of each token."""

    loss_R: Tensor
    cut_R: Tensor
    """Where clipping decides the loss, bool."""


def clipped(objective: ObjectiveOptions, ratio_R: Tensor, advantages_R: Tensor) -> Surrogate:
    """Return the clipped surrogate (PPO, arXiv 1707.06347), with clip-higher (DAPO, arXiv 2503.14476) and dual clip
    (arXiv 1912.09729) where they are set. Where it is cut the gradient is 0."""
    low, high = _bounds(objective)
    plain_R = -ratio_R * advantages_R
    clipped_R = -ratio_R.clamp(low, high) * advantages_R
    loss_R, cut_R = torch.maximum(plain_R, clipped_R), clipped_R > plain_R
    if objective.eps_clip_c is not None:
        most_R = -objective.eps_clip_c * advantages_R
        beyond_R = (advantages_R < 0) & (loss_R > most_R)
        loss_R, cut_R = torch.where(beyond_R, most_R, loss_R), cut_R | beyond_R
    return Surrogate(loss_R, cut_R)


def clipped_weights(
    objective: ObjectiveOptions, ratio_R: Tensor, advantages_R: Tensor, log_probs_R: Tensor
) -> Surrogate:
    """Return the REINFORCE loss weighted by the clipped ratio (CISPO, arXiv 2506.13585): every token keeps a gradient,
    which clipping only bounds."""
    fixed_R = ratio_R.detach()
    weights_R = fixed_R.clamp(*_bounds(objective))
    return Surrogate(-weights_R * advantages_R * log_probs_R, weights_R != fixed_R)


def sequence_log_ratios(log_ratio_R: Tensor, kept_R: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return for each token the mean log-ratio over the unmasked tokens of its sample (GSPO, arXiv 2507.18071).

    The gradient is the token's own (GSPO-token, section 4.3 there): where all tokens of a sample have one advantage the
    loss and its gradient are those of GSPO, and a token that a correction or a reducer leaves out does not pull.
    `log_ratio_R` is 0 where `kept_R` is False.
    """
    fixed_R = log_ratio_R.detach()
    counts_B = segment_sums(kept_R.to(fixed_R.dtype), lengths)
    means_B = segment_sums(fixed_R, lengths) / counts_B.clamp(min=1.0)
    return means_B[segment_ids(lengths, fixed_R.device)] + (log_ratio_R - fixed_R)


def _bounds(objective: ObjectiveOptions) -> tuple[float, float]:
    high = objective.eps_clip if objective.eps_clip_high is None else objective.eps_clip_high
    return 1 - objective.eps_clip, 1 + high
