"""The critic's loss: squared distance from the returns, clipped where a value has moved far (PPO)."""

# ruff: noqa: N803, N806  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_train.options import ObjectiveOptions

__all__ = ["value_loss"]


def value_loss(
    objective: ObjectiveOptions, batch: dict[str, Any], values_R: Tensor, reduce: Callable[[Tensor], Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and `value_loss, value_clipfrac`.

    Called once a micro-batch. `values_R` are the critic's values of all response tokens, with gradient; `batch` has
    `values`, those before the rollout's first step, and `returns`, 1-D a sample. A token's loss is half the square of
    value less return, or where that is more, of the value kept within --value-clip of the old one, less return: then
    it has no gradient and counts in `value_clipfrac`.
    """
    returns_R = torch.cat(batch["returns"])
    squares_R = (values_R - returns_R).square()
    cut_R = torch.zeros_like(squares_R, dtype=torch.bool)
    if objective.value_clip is not None:
        old_R = torch.cat(batch["values"])
        kept_R = values_R.clamp(old_R - objective.value_clip, old_R + objective.value_clip)
        clipped_R = (kept_R - returns_R).square()
        squares_R, cut_R = torch.maximum(squares_R, clipped_R), clipped_R > squares_R
    loss = reduce(squares_R / 2)
    with torch.no_grad():
        return loss, {"value_loss": loss.detach(), "value_clipfrac": reduce(cut_R.to(squares_R.dtype))}
