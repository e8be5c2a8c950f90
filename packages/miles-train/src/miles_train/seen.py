"""What the forward passes of an optimizer step showed, and the look at it before the weights change."""

# ruff: noqa: N815  the shape suffix: R response tokens

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from miles_train.guards import check_finite, check_finite_losses

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

__all__ = ["Seen", "check_seen"]


class Seen(NamedTuple):
    """One micro-batch's forward pass, kept until the guards have looked at it."""

    batch: dict[str, Any]
    """The columns of the micro-batch."""
    log_probs_R: Tensor
    """Detached, of all response tokens; empty where the loss asked for none."""
    loss: Tensor
    """Detached scalar, divided by the step's denominator."""


def check_seen(seen: Sequence[Seen], where: str, loss_name: str = "the loss") -> None:
    """Stop if a log-prob or a loss of a step is not finite; called after its passes, before the optimizer.

    `where` names the rollout and the step, `loss_name` the loss and the hooks it went through. `seen` is empty on
    pipeline stages before the last.

    Raises:
        MilesError: naming the first sample with such a log-prob, else the first micro-batch with such a loss.
    """
    if not seen:
        return
    passed = [one for one in seen if len(one.log_probs_R)]
    lengths = [n for one in passed for n in one.batch["response_lengths"]]
    indices = [i for one in passed for i in one.batch["sample_indices"]]
    check_finite("log_probs", torch.cat([one.log_probs_R for one in seen]), lengths, indices, where)
    check_finite_losses([one.loss for one in seen], [one.batch["sample_indices"] for one in seen], where, loss_name)
