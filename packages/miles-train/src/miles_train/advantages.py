"""Advantages of response tokens from rewards, and their whitening over all data-parallel ranks."""

# ruff: noqa: N806, N815  the shape suffixes
# R response tokens of the rank's samples

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from miles_api.errors import SampleError
from miles_train.gae import generalized_advantages, sums_to_go, tokens_after
from miles_train.loss.kl import kl_divergence
from miles_train.reducers import segment_ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_train.estimators import Estimator
    from miles_train.options import ObjectiveOptions
    from miles_train.parallel import Group

__all__ = [
    "ADVANTAGE_METRICS",
    "advantage_metrics",
    "finish_advantage_metrics",
    "set_advantages",
    "whiten_advantages",
]

_LEAST_VARIANCE = 1e-8
_MEANS = ("kl_reward", "opd_kl")
ADVANTAGE_METRICS = frozenset({f"{name}{part}" for name in _MEANS for part in ("", "_sum", "_tokens")})
"""Names that these functions use; no hook's metric may have one."""


def set_advantages(rollout_data: dict[str, Any], estimator: Estimator, objective: ObjectiveOptions) -> None:
    """Set `advantages` and `returns`, lists of 1-D fp32 tensors of the response's length.

    Called once a rollout on each rank, after all passes. `rewards` are as the rollout's reward post-processing left
    them: with grpo (arXiv 2402.03300) and gspo normalised within their groups. Every token of a sample gets its reward,
    less its baseline. With an estimator that discounts (REINFORCE++, arXiv 2501.03262) that is times --gamma to the
    power of the unmasked tokens after it: a tool's output takes no time. With --kl-coef each unmasked token loses the
    KL divergences from it on, discounted alike. With ppo, `generalized_advantages` compares rewards, that of a sample
    at its last unmasked token, with the column `values`.

    With --use-opd the teacher's part is added at the end, to `advantages` alone. Masked tokens may carry a value too:
    reducers leave them out.

    Raises:
        SampleError: --use-opd is set and the rollout has no column `teacher_log_probs`.
    """
    tokens = _Tokens.of(rollout_data)
    if estimator.needs_values:
        advantages_R, returns_R = _critic_advantages(rollout_data, tokens, objective)
    else:
        advantages_R = returns_R = _returns(rollout_data, tokens, estimator, objective)
    if objective.use_opd:
        advantages_R = advantages_R - objective.opd_kl_coef * _teacher_gaps(rollout_data, tokens)
    rollout_data["advantages"] = list(advantages_R.float().split(tokens.lengths))
    rollout_data["returns"] = list(returns_R.float().split(tokens.lengths))


def advantage_metrics(rollout_data: dict[str, Any], objective: ObjectiveOptions) -> dict[str, Tensor]:
    """Return what --kl-coef and --use-opd measure, as sums over unmasked tokens and their number.

    Called once a rollout when masks are final; empty on pipeline stages without log-probs. `finish_advantage_metrics`
    makes means of them: `kl_reward`, the KL divergence from the reference model that rewards lose --kl-coef times of,
    and `opd_kl`, old less teacher log-prob.
    """
    tokens = _Tokens.of(rollout_data)
    sums: dict[str, Tensor] = {}
    if objective.kl_coef > 0 and {"log_probs", "ref_log_probs"} <= set(rollout_data):
        sums["kl_reward"] = _divergences(rollout_data, tokens, objective).sum()
    if objective.use_opd and {"log_probs", "teacher_log_probs"} <= set(rollout_data):
        sums["opd_kl"] = _teacher_gaps(rollout_data, tokens).sum()
    totals = {f"{name}_sum": total for name, total in sums.items()}
    return totals | {f"{name}_tokens": tokens.kept_R.sum() for name in sums}


def finish_advantage_metrics(numbers: dict[str, float]) -> dict[str, float]:
    """Return the metrics with the sums of `advantage_metrics`, over all ranks, replaced by means."""
    named = dict(numbers)
    for name in _MEANS:
        total, count = named.pop(f"{name}_sum", None), named.pop(f"{name}_tokens", None)
        if total is not None and count:
            named[name] = total / count
    return named


class _Tokens(NamedTuple):
    """The response tokens of a rank's samples, one after another."""

    lengths: list[int]
    kept_R: Tensor
    """Whether a token is unmasked."""

    @classmethod
    def of(cls, rollout_data: dict[str, Any]) -> _Tokens:
        masks = rollout_data["loss_masks"]
        return cls([len(mask) for mask in masks], torch.cat(masks) != 0)

    def spread(self, numbers: Sequence[float]) -> Tensor:
        """Return each sample's number for all its tokens, fp64."""
        device = self.kept_R.device
        return torch.tensor(numbers, dtype=torch.float64, device=device)[segment_ids(self.lengths, device)]

    def log_ratios(self, rollout_data: dict[str, Any], other: str) -> Tensor:
        """Return old log-probs less those of another column, fp64, 0 for masked tokens, which may hold any."""
        gap_R = torch.cat(rollout_data["log_probs"]).double() - torch.cat(rollout_data[other]).double()
        return torch.where(self.kept_R, gap_R, 0.0)


def _returns(
    rollout_data: dict[str, Any], tokens: _Tokens, estimator: Estimator, objective: ObjectiveOptions
) -> Tensor:
    """Return each token's reward less baseline, discounted, and less the KL divergences that follow."""
    rewards = rollout_data["rewards"]
    if estimator.baseline is not None:
        rewards = [reward - own for reward, own in zip(rewards, rollout_data["baselines"], strict=True)]
    returns_R = tokens.spread(rewards)
    gamma = objective.gamma if estimator.discounts else 1.0
    if gamma != 1.0:
        returns_R *= torch.full_like(returns_R, gamma).pow(tokens_after(tokens.kept_R, tokens.lengths))
    if objective.kl_coef > 0:
        penalty_R = objective.kl_coef * _divergences(rollout_data, tokens, objective)
        returns_R -= sums_to_go(penalty_R, tokens.kept_R, tokens.lengths, gamma)
    return returns_R


def _critic_advantages(
    rollout_data: dict[str, Any], tokens: _Tokens, objective: ObjectiveOptions
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns of each token's own reward."""
    lengths, kept_R = tokens
    # Masked tokens at the end get the reward too, and are left out below.
    rewards_R = torch.where(tokens_after(kept_R, lengths) == 0, tokens.spread(rollout_data["rewards"]), 0.0)
    if objective.kl_coef > 0:
        rewards_R -= objective.kl_coef * _divergences(rollout_data, tokens, objective)
    values_R = torch.cat(rollout_data["values"])
    return generalized_advantages(rewards_R, values_R, kept_R, lengths, gamma=objective.gamma, lambd=objective.lambd)


def _divergences(rollout_data: dict[str, Any], tokens: _Tokens, objective: ObjectiveOptions) -> Tensor:
    """Return the KL divergence of the old policy from the reference model for each token, 0 for masked ones."""
    return kl_divergence(tokens.log_ratios(rollout_data, "ref_log_probs"), objective.kl_loss_type or "k1")


def _teacher_gaps(rollout_data: dict[str, Any], tokens: _Tokens) -> Tensor:
    """Return old less teacher log-prob of each token, 0 for masked ones."""
    if "teacher_log_probs" not in rollout_data:
        raise SampleError(
            "--use-opd needs the column 'teacher_log_probs', which this rollout does not have: name the teacher's "
            "directory with --opd-teacher-load, or set `teacher_log_probs` of samples in a generate hook"
        )
    return tokens.log_ratios(rollout_data, "teacher_log_probs")


def whiten_advantages(rollout_data: dict[str, Any], dp: Group) -> None:
    """Bring `advantages` to mean 0 and spread 1 over the unmasked tokens of the whole rollout; `returns` stay.

    Called once a rollout, after `rollout_data_postprocess` hooks, so that the masks they changed count; a collective of
    the data-parallel ranks `dp`. Advantages that are all equal become exactly 0, those of masked tokens too.
    """
    lengths = [len(values) for values in rollout_data["advantages"]]
    kept_R = torch.cat(rollout_data["loss_masks"]) != 0
    values_R = torch.where(kept_R, torch.cat(rollout_data["advantages"]).double(), 0.0)
    count, total = _sums_over_ranks(dp, kept_R.sum(), values_R.sum())
    # Sums of equal fp32 numbers are exact in fp64, so that equal advantages become 0 and not a rounding error.
    centred_R = torch.where(kept_R, values_R - total / max(count, 1.0), 0.0)
    [squares] = _sums_over_ranks(dp, centred_R.square().sum())
    scale = 1.0 / math.sqrt(squares / max(count, 1.0) + _LEAST_VARIANCE)
    rollout_data["advantages"] = list((centred_R * scale).float().split(lengths))


def _sums_over_ranks(dp: Group, *parts: Tensor) -> list[float]:
    """Return the sum of each scalar over the ranks: the very same number on all ranks of the model, which decide by
    it what runs."""
    mine = torch.stack([part.double() for part in parts])
    ranks = [mine]
    if dp.size > 1:
        ranks = [torch.empty_like(mine) for _ in range(dp.size)]
        dist.all_gather(ranks, mine, group=dp.group)
    # fsum rounds once, whatever the order.
    return [math.fsum(column) for column in torch.stack(ranks).T.tolist()]
