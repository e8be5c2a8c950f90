"""The clipped policy-gradient loss (PPO, arXiv 1707.06347) with clip-higher (DAPO, arXiv 2503.14476)."""

# ruff: noqa: N806  the shape suffixes
# R response tokens of the micro-batch

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from miles_train.options import ObjectiveOptions

__all__ = ["policy_loss"]

_Reduce = Callable[[Tensor], Tensor]
_LogProbs = Callable[..., tuple[list[Tensor], list[Tensor] | None]]


def policy_loss(
    objective: ObjectiveOptions,
    batch: dict[str, Any],
    logits: Tensor,
    reduce: _Reduce,
    *,
    log_probs_and_entropy: _LogProbs,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and `loss, pg_clipfrac, ppo_kl, ratio_max`, and `entropy` with an entropy bonus.

    Called once a micro-batch. `batch` has `advantages`, `loss_masks` and, unless this is the only step on the rollout,
    `log_probs`: the old ones, 1-D a sample. Without them the current ones serve, detached. `ppo_kl` is the mean of
    old minus current log-probs; a token counts in `pg_clipfrac` where the clipped term is the larger loss.
    """
    want_entropy = objective.entropy_coef > 0
    current, entropies = log_probs_and_entropy(logits, entropy=want_entropy)
    log_probs_R = torch.cat(current)
    old_R = torch.cat(batch["log_probs"]) if "log_probs" in batch else log_probs_R.detach()
    advantages_R = torch.cat(batch["advantages"])
    kept_R = torch.cat(batch["loss_masks"]) != 0
    # Masked tokens may hold any old log-prob; exp of it could overflow and turn the gradient into NaN.
    log_ratio_R = torch.where(kept_R, log_probs_R - old_R, 0.0)
    ratio_R = log_ratio_R.exp()
    high = objective.eps_clip if objective.eps_clip_high is None else objective.eps_clip_high
    plain_R = -ratio_R * advantages_R
    clipped_R = -ratio_R.clamp(1 - objective.eps_clip, 1 + high) * advantages_R
    pg_loss = loss = reduce(torch.maximum(plain_R, clipped_R))
    with torch.no_grad():
        metrics = {
            "pg_clipfrac": reduce((clipped_R > plain_R).float()),
            "ppo_kl": reduce(-log_ratio_R),
            "ratio_max": torch.where(kept_R, ratio_R, 0.0).amax() if len(ratio_R) else ratio_R.new_zeros(()),
        }
    if entropies is not None:
        entropy = reduce(torch.cat(entropies))
        loss = pg_loss - objective.entropy_coef * entropy
        metrics |= {"pg_loss": pg_loss.detach(), "entropy": entropy.detach()}
    return loss, {"loss": loss.detach(), **metrics}
