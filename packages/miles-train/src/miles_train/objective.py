"""What a rollout is trained on: the exchangeable functions, which samples run, what their sums are divided by."""

# ruff: noqa: N803, N806  the shape suffixes: R response tokens of the micro-batch or rollout

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from miles_api.errors import ConfigError, SampleError
from miles_train.advantages import grpo_advantages
from miles_train.guards import check_finite_numbers
from miles_train.loss import policy_loss, sft_loss
from miles_train.reducers import segment_sums, sum_of_sample_mean

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from miles_api.run_options import RunOptions
    from miles_train.options import ObjectiveOptions

__all__ = [
    "Pieces",
    "Plan",
    "Step",
    "check_policy_columns",
    "logprob_gap",
    "pieces_of",
    "plan_steps",
    "report_metrics",
    "samples_that_pull",
]

_LOSSES = {"policy_loss": policy_loss, "sft_loss": sft_loss}
_ADVANTAGES = {"grpo": grpo_advantages}


class Pieces(NamedTuple):
    """The exchangeable functions of the objective; the trainer calls each in exactly one place."""

    advantage: Callable[[dict[str, Any]], None] | None
    """Sets `advantages` and `returns` on the rollout data; None for losses that have none."""
    loss: Callable[..., tuple[Tensor, dict[str, Tensor]]]
    """As described in `miles_train.loss`."""
    reducer: Callable[..., Callable[[Tensor], Tensor]]
    """As `miles_train.reducers.sum_of_sample_mean`."""
    advantage_reads_log_probs: bool = False
    """Whether every sample needs its old `log_probs` before `advantage` is called. Without that, they are computed only
    for samples that run after the first step."""


def pieces_of(run: RunOptions, objective: ObjectiveOptions) -> Pieces:
    """Return the functions that the options ask for.

    Raises:
        ConfigError: `loss_type` is one this trainer does not have.
    """
    if run.loss_type not in _LOSSES:
        raise ConfigError(f"--loss-type {run.loss_type} is not available; this trainer has {', '.join(_LOSSES)}")
    advantage = _ADVANTAGES[objective.advantage_estimator] if run.loss_type == "policy_loss" else None
    return Pieces(advantage, _LOSSES[run.loss_type], sum_of_sample_mean)


def check_policy_columns(columns: dict[str, Any], *, use_rollout_logprobs: bool) -> None:
    """Raise `SampleError` if a policy loss lacks a column, `MilesError` if a reward is not finite."""
    if "rewards" not in columns:
        raise SampleError("the train batch has no column 'rewards', which --loss-type policy_loss needs")
    check_finite_numbers("the reward", columns["rewards"], columns["sample_indices"])
    if use_rollout_logprobs and "rollout_log_probs" not in columns:
        raise SampleError(
            "--use-rollout-logprobs needs the column 'rollout_log_probs', which this rollout does not have: "
            "generate with log-probs, or leave the flag out to recompute them"
        )


class Step(NamedTuple):
    """One optimizer step of this rank; its denominators count all data-parallel ranks."""

    number: int
    positions: list[int]
    """The samples of this rank that run, as positions in the rollout data; empty if none runs on any rank."""
    loss_denominator: float
    """Samples (or unmasked tokens) of the step, those left out included."""
    metric_denominator: float
    """Samples (or unmasked tokens) of the step that run."""


class Plan(NamedTuple):
    """The optimizer steps of a rollout; the counts are over all data-parallel ranks."""

    steps: list[Step]
    samples_skipped: int
    steps_skipped: int


def samples_that_pull(rollout_data: dict[str, Any]) -> list[bool]:
    """Say of each sample whether any of its unmasked tokens has an advantage other than 0."""
    pull_R = torch.cat(rollout_data["advantages"]).abs() * torch.cat(rollout_data["loss_masks"])
    return (segment_sums(pull_R, rollout_data["response_lengths"]) > 0).tolist()


def plan_steps(
    rollout_data: dict[str, Any],
    shares: Sequence[Sequence[int]],
    running: Sequence[bool],
    *,
    per_token: bool,
    sum_over_ranks: Callable[[list[list[float]]], list[list[float]]] = lambda counts: counts,
) -> Plan:
    """Choose the samples that run in each step and count its denominators.

    Called once a rollout, after advantages, when loss masks are final. `shares` has this rank's positions for each
    step; `sum_over_ranks` adds up a small matrix of counts over the data-parallel ranks.
    """
    mask_sums = segment_sums(torch.cat(rollout_data["loss_masks"]), rollout_data["response_lengths"]).tolist()
    active = [[i for i in share if running[i]] for share in shares]
    counts = sum_over_ranks(
        [
            [len(share), sum(mask_sums[i] for i in share), len(runs), sum(mask_sums[i] for i in runs)]
            for share, runs in zip(shares, active, strict=True)
        ]
    )
    steps = []
    for number, (samples, tokens, some, some_tokens) in enumerate(counts):
        positions = active[number]
        if some and not positions:
            # Another rank has something to train on and waits for this one: a sample that adds a gradient of 0.
            positions = [min(shares[number], key=rollout_data["total_lengths"].__getitem__)]
        denominators = (tokens, some_tokens) if per_token else (samples, some)
        steps.append(Step(number, positions, *(max(float(count), 1.0) for count in denominators)))
    skipped = int(sum(samples - some for samples, _, some, _ in counts))
    return Plan(steps, skipped, sum(1 for step in steps if not step.positions))


def logprob_gap(log_probs_R: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Compare the trainer's log-probs with the engine's, over unmasked response tokens of one micro-batch.

    Returns `logprob_gap_sum`, `logprob_gap_tokens` and `logprob_gap_max`, or nothing without `rollout_log_probs`.
    """
    if "rollout_log_probs" not in batch or not len(log_probs_R):
        return {}
    mask_R = torch.cat(batch["loss_masks"]) != 0
    gap_R = torch.where(mask_R, (log_probs_R - torch.cat(batch["rollout_log_probs"])).abs(), 0.0)
    return {"logprob_gap_sum": gap_R.sum(), "logprob_gap_tokens": mask_R.sum(), "logprob_gap_max": gap_R.amax()}


def report_metrics(numbers: dict[str, float], trained_steps: int) -> dict[str, float]:
    """Return the metrics of a report from totals over ranks: the gap as a mean over its tokens, names prefixed."""
    named = dict(numbers)
    tokens, total = named.pop("logprob_gap_tokens", 0.0), named.pop("logprob_gap_sum", 0.0)
    if tokens:
        named["logprob_gap_mean"] = total / tokens
    if not trained_steps:
        named |= {"loss": 0.0, "tokens": 0.0}
    return {f"train/{name}": float(value) for name, value in sorted(named.items())}
