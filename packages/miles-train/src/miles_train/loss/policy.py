"""The policy-gradient loss: an importance ratio of tokens or sequences, a surrogate, corrections, a reduction."""

# ruff: noqa: N803, N806  the shape suffixes
# R response tokens of the micro-batch

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_train.loss.kl import kl_divergence
from miles_train.loss.surrogates import clipped, clipped_weights, sequence_log_ratios
from miles_train.metrics import is_max
from miles_train.zero_gradient import UNCUT

if TYPE_CHECKING:
    from miles_train.options import ObjectiveOptions

__all__ = ["policy_loss"]

_Reduce = Callable[[Tensor], Tensor]
_LogProbs = Callable[..., tuple[list[Tensor], list[Tensor] | None]]
_Correct = Callable[[dict[str, Any], Tensor, list[Tensor]], tuple[Tensor, dict[str, Tensor]]]


def policy_loss(
    objective: ObjectiveOptions,
    batch: dict[str, Any],
    logits: Tensor,
    reduce: _Reduce,
    *,
    log_probs_and_entropy: _LogProbs,
    correct: _Correct | None = None,
    pg_reducer: Callable[[dict[str, Any]], _Reduce] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and `loss, pg_clipfrac, ppo_kl, ratio_max`, `entropy` with an entropy bonus or --report-entropy,
    `kl_loss` with --use-kl-loss, and `pg_loss` where one of these two is part of the loss.

    Called once a micro-batch. `batch` has `advantages`, `loss_masks` and, unless this is the only step on the rollout,
    `log_probs`: the old ones, 1-D a sample. Without them the current ones serve, detached. With --use-kl-loss it has
    `ref_log_probs` too. `ppo_kl` is the mean of old minus current log-probs; a token counts in `pg_clipfrac` where
    clipping decides its loss; `ratio_max` is of the ratios that the surrogate gets: of whole responses with
    --advantage-estimator gspo, else of tokens. Beside them there is `zero_gradient.UNCUT`.

    `correct(batch, pg_loss, train_log_probs)` returns another loss of each token and metrics of each token;
    `train_log_probs` are the recomputed old log-probs, else the current ones, detached. With --get-mismatch-metrics
    alone only its metrics count. `pg_reducer(batch)` returns what reduces the policy loss, and nothing else, in the
    place of `reduce`.
    """
    want_entropy = objective.entropy_coef > 0 or objective.report_entropy
    current, entropies = log_probs_and_entropy(logits, entropy=want_entropy)
    log_probs_R = torch.cat(current)
    old_R = torch.cat(batch["log_probs"]) if "log_probs" in batch else log_probs_R.detach()
    advantages_R = torch.cat(batch["advantages"])
    kept_R = torch.cat(batch["loss_masks"]) != 0
    # Masked tokens may hold any old log-prob; exp of it could overflow and turn the gradient into NaN.
    log_ratio_R = torch.where(kept_R, log_probs_R - old_R, 0.0)
    if objective.advantage_estimator == "gspo":
        lengths = [len(mask) for mask in batch["loss_masks"]]
        ratio_R = sequence_log_ratios(log_ratio_R, kept_R, lengths).exp()
    else:
        ratio_R = log_ratio_R.exp()
    if objective.policy_loss_type == "cispo":
        pg_loss_R, cut_R = clipped_weights(objective, ratio_R, advantages_R, log_probs_R)
    else:
        pg_loss_R, cut_R = clipped(objective, ratio_R, advantages_R)
    measured: dict[str, Tensor] = {}
    if correct is not None:
        recomputed = "log_probs" in batch and not objective.use_rollout_logprobs
        scored = batch["log_probs"] if recomputed else [values.detach() for values in current]
        if objective.use_tis:
            pg_loss_R, measured = correct(batch, pg_loss_R, scored)
        else:
            _, measured = correct(batch, pg_loss_R.detach().clone(), scored)
    pg_loss = loss = (pg_reducer(batch) if pg_reducer is not None else reduce)(pg_loss_R)
    with torch.no_grad():
        metrics = _reduced(measured, kept_R, reduce) | {
            "pg_clipfrac": reduce(cut_R.float()),
            "ppo_kl": reduce(-log_ratio_R),
            UNCUT: _uncut(objective, advantages_R, kept_R, cut_R),
            "ratio_max": torch.where(kept_R, ratio_R, 0.0).amax() if len(ratio_R) else ratio_R.new_zeros(()),
        }
    for name, (weight, value) in _weighted(objective, batch, entropies, log_probs_R, log_ratio_R, reduce).items():
        metrics[name] = value.detach()
        if weight:
            loss = loss + weight * value
            metrics["pg_loss"] = pg_loss.detach()
    return loss, {"loss": loss.detach(), **metrics}


def _weighted(
    objective: ObjectiveOptions,
    batch: dict[str, Any],
    entropies: list[Tensor] | None,
    log_probs_R: Tensor,
    log_ratio_R: Tensor,
    reduce: _Reduce,
) -> dict[str, tuple[float, Tensor]]:
    """Return what is reported and, with its weight, part of the loss: entropy and KL divergence, reduced."""
    found: dict[str, tuple[float, Tensor]] = {}
    if entropies is not None:
        found["entropy"] = -objective.entropy_coef, reduce(torch.cat(entropies))
    if objective.use_kl_loss:
        divergence_R = _divergence(objective, batch, log_probs_R, log_ratio_R)
        found["kl_loss"] = objective.kl_loss_coef, reduce(divergence_R)
    return found


def _divergence(objective: ObjectiveOptions, batch: dict[str, Any], log_probs_R: Tensor, log_ratio_R: Tensor) -> Tensor:
    """Return the KL divergence from the reference model for each token, 0 for masked ones.

    With --use-unbiased-kl it is weighted by the token's importance ratio. Ratio and divergence both have their
    gradient: so the slope of the mean over tokens of the old policy is that of the mean over tokens of the current one.
    """
    kept_R = torch.cat(batch["loss_masks"]) != 0
    ref_R = torch.cat(batch["ref_log_probs"])
    # Masked tokens may hold any reference log-prob: exp of it could overflow and turn the gradient into NaN.
    gap_R = torch.where(kept_R, log_probs_R - ref_R, 0.0)
    weights_R = log_ratio_R.exp() if objective.use_unbiased_kl else None
    return kl_divergence(gap_R, objective.kl_loss_type or "k3", weights_R)


def _uncut(objective: ObjectiveOptions, advantages_R: Tensor, kept_R: Tensor, cut_R: Tensor) -> Tensor:
    """Return the largest size of an advantage whose token has a gradient; clipped weights leave every token one."""
    pulls_R = kept_R if objective.policy_loss_type == "cispo" else kept_R & ~cut_R
    return torch.where(pulls_R, advantages_R, 0.0).abs().amax() if len(kept_R) else advantages_R.new_zeros(())


def _reduced(measured: dict[str, Tensor], kept_R: Tensor, reduce: _Reduce) -> dict[str, Tensor]:
    """Reduce metrics of each token: to their sum over samples, or to the largest."""
    metrics = {name: reduce(values_R) for name, values_R in measured.items() if not is_max(name)}
    largest = {name: values_R[kept_R] for name, values_R in measured.items() if is_max(name)}
    return metrics | {name: values.amax() for name, values in largest.items() if len(values)}
