"""Negative log-likelihood of the response tokens that the loss mask keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_train.options import ObjectiveOptions

__all__ = ["sft_loss"]


def sft_loss(
    objective: ObjectiveOptions,  # noqa: ARG001  every loss is called alike
    batch: dict[str, Any],  # noqa: ARG001
    logits: Tensor,
    reduce: Callable[[Tensor], Tensor],
    *,
    log_probs_and_entropy: Callable[..., tuple[list[Tensor], list[Tensor] | None]],
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and `loss`. Called once a micro-batch; it needs no column but those every batch has."""
    log_probs, _ = log_probs_and_entropy(logits)
    loss = reduce(-torch.cat(log_probs))
    return loss, {"loss": loss.detach()}
