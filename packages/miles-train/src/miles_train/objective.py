"""What a rollout is trained on: the exchangeable functions, which samples run, what their sums are divided by."""

# ruff: noqa: N806  the shape suffixes: R response tokens of the micro-batch or rollout

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from miles_api.errors import ConfigError, SampleError
from miles_api.run_options import RunOptions
from miles_train.advantages import finish_advantage_metrics, set_advantages, whiten_advantages
from miles_train.estimators import ESTIMATORS, with_baselines
from miles_train.guards import check_finite_numbers
from miles_train.hook_calls import call_advantage, call_importance_weights, call_loss, call_pg_loss_reducer
from miles_train.hook_results import LOSSES
from miles_train.loss import policy_loss, sft_loss
from miles_train.metrics import is_max
from miles_train.mismatch import finish_mismatch
from miles_train.needs import needs_old_log_probs_first, whitens
from miles_train.options import ObjectiveOptions
from miles_train.reducers import mask_weights, segment_sums
from miles_train.train_hooks import check_train_hooks
from miles_train.zero_gradient import count_zero_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.config import RunConfig
    from miles_train.metrics import Metrics
    from miles_train.siblings import Siblings
    from miles_train.train_hooks import HookCalls

__all__ = [
    "Pieces",
    "Plan",
    "Step",
    "add_loss_metrics",
    "check_policy_columns",
    "pieces_of",
    "plan_steps",
    "report_metrics",
    "samples_that_pull",
]

_NAMED_AT_MOST = 8
_SumOverRanks = Callable[[list[list[float]]], list[list[float]]]


class Pieces(NamedTuple):
    """The exchangeable functions of the objective, defaults or hooks; the trainer calls each in exactly one place."""

    advantage: Callable[[dict[str, Any]], None] | None
    """Sets `advantages` and `returns` on the rollout data; None for losses that have none."""
    loss: Callable[..., tuple[Tensor, dict[str, Any]]]
    """As described in `miles_train.loss`, without its first argument."""
    loss_name: str = "the loss"
    """How errors name what `loss` returns."""
    skips: bool = False
    """Whether samples that pull in no direction are left out."""
    late_columns: bool = False
    """Whether hooks may set advantages or masks, or models' columns make them: then only the last pipeline stage, which
    calls the hooks and has the columns, has them."""
    baselines: Callable[[dict[str, Any]], dict[str, Any]] = lambda columns: columns
    """Adds to the columns of all ranks what `advantage` needs to know of whole groups."""
    normalise: Callable[[dict[str, Any]], None] | None = None
    """Changes the advantages once masks are final; a collective of the data-parallel ranks."""

    def idle(self, columns: dict[str, Any]) -> list[bool] | None:
        """Say which samples of all ranks will have no advantage and be left out, where their rewards alone tell; they
        should not count when ranks are balanced."""
        if not self.skips or self.late_columns or self.normalise is not None:
            return None
        rewards = columns["rewards"]
        return [r == b for r, b in zip(rewards, columns.get("baselines", [0.0] * len(rewards)), strict=True)]


def pieces_of(config: RunConfig, hooks: HookCalls) -> Pieces:
    """Return the functions that options and hooks ask for.

    Raises:
        ConfigError: the options contradict each other, or name a loss that this trainer does not have.
    """
    problems = list(check_train_hooks(config))
    if problems:
        raise ConfigError("\n".join(problems))
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    if run.loss_type == "sft_loss":
        return Pieces(None, partial(sft_loss, objective), late_columns=bool(hooks.many("rollout_data_postprocess")))
    own_loss = hooks.one("loss")
    if run.loss_type == "custom_loss" and own_loss is not None:
        loss, name, skips = partial(call_loss, hooks, own_loss), f"the loss of {hooks.named(own_loss)}", False
    else:
        loss, name, skips = _policy_loss(objective, hooks)
    own = hooks.one("advantage")
    # Stages before the last have neither a critic's values nor log-probs.
    reads = ESTIMATORS[objective.advantage_estimator].needs_values or needs_old_log_probs_first(objective)
    late = own is not None or bool(hooks.many("rollout_data_postprocess")) or reads
    normalise = None
    if whitens(objective, made_by_hook=own is not None):
        # Looked up at the call: the process groups do not exist yet.
        normalise = lambda data: whiten_advantages(data, hooks.parallel.dp)  # noqa: E731
    if own is not None:
        return Pieces(partial(call_advantage, hooks, own), loss, name, skips, late, normalise=normalise)
    estimator = ESTIMATORS[objective.advantage_estimator]
    return Pieces(
        partial(set_advantages, estimator=estimator, objective=objective),
        loss,
        name,
        skips,
        late,
        baselines=partial(with_baselines, estimator=estimator),
        normalise=normalise,
    )


def _policy_loss(objective: ObjectiveOptions, hooks: HookCalls) -> tuple[Any, str, bool]:
    """Return the policy loss with its parts, its name for errors, and whether a sample without advantage adds 0."""
    parts: dict[str, Any] = {}
    through = []
    corrected = hooks.one("importance_weights")
    if objective.use_tis or objective.get_mismatch_metrics:
        parts["correct"] = partial(call_importance_weights, hooks)
        through += [corrected] if corrected is not None and objective.use_tis else []
    reducer = hooks.one("pg_loss_reducer")
    if reducer is not None:
        parts["pg_reducer"] = partial(call_pg_loss_reducer, hooks, per_token=objective.calculate_per_token_loss)
        through.append(reducer)
    name = "the loss" + (f" (through {' and '.join(map(hooks.named, through))})" if through else "")
    penalised = objective.entropy_coef > 0 or (objective.use_kl_loss and objective.kl_loss_coef > 0)
    adds_nothing = not penalised and not (objective.use_tis and corrected is not None)
    return partial(policy_loss, objective, **parts), name, objective.skip_zero_advantage and adds_nothing


def check_policy_columns(
    columns: dict[str, Any], objective: ObjectiveOptions, *, rewards: bool, origin: str = ""
) -> None:
    """Raise `SampleError` if a loss with advantages lacks a column, `MilesError` if a reward is not finite.

    `rewards` says that the advantages are made of them, `origin` which hook made the columns.
    """
    if "rewards" in columns:
        check_finite_numbers("the reward", columns["rewards"], columns["sample_indices"], origin)
    elif rewards:
        raise SampleError("the train batch has no column 'rewards', which --advantage-estimator needs")
    if "rollout_log_probs" in columns:
        return
    indices = columns["sample_indices"]
    lacking = ", ".join(map(str, indices[:_NAMED_AT_MOST])) + (" …" if len(indices) > _NAMED_AT_MOST else "")
    if objective.use_rollout_logprobs:
        raise SampleError(
            f"--use-rollout-logprobs needs the column 'rollout_log_probs', which this rollout does not have (samples "
            f"{lacking}): generate with log-probs, or leave the flag out to recompute them"
        )
    if objective.use_tis or objective.get_mismatch_metrics:
        flag = "--use-tis" if objective.use_tis else "--get-mismatch-metrics"
        raise SampleError(
            f"{flag} needs the column 'rollout_log_probs', which this rollout does not have (samples {lacking}): "
            "generate with log-probs"
        )


class Step(NamedTuple):
    """One optimizer step of this rank; its denominators count all data-parallel ranks."""

    number: int
    positions: list[int]
    """The samples of this rank that run, as positions in the rollout data; empty if none runs on any rank."""
    loss_denominator: float
    """Rollouts (or unmasked tokens) of the step, those removed or left out included."""
    metric_denominator: float
    """What the reducer makes of values that are all 1, over the samples that run: rollouts with an unmasked token (or
    such tokens)."""
    stand_in: bool = False
    """Whether the one sample here only keeps this rank in step with the others; no denominator of metrics counts it."""


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
    objective: ObjectiveOptions,
    siblings: Siblings | None = None,
    *,
    sum_over_ranks: _SumOverRanks = lambda counts: counts,
) -> Plan:
    """Choose the samples that run in each step and count its denominators.

    Called for each model that is trained on a rollout, after advantages and `sum_rollout_masks`, when loss masks are
    final. `shares` has this rank's positions for each step, `siblings` its samples' rollouts where some have several;
    `sum_over_ranks` adds up a small matrix of counts over the data-parallel ranks.
    """
    active = [[i for i in share if running[i]] for share in shares]
    counts = sum_over_ranks(_counts(rollout_data, shares, active, objective, siblings))
    steps = []
    for number, (_, some, everything, weight) in enumerate(counts):
        positions = active[number]
        stand_in = bool(some) and not positions
        if stand_in:
            # Another rank has something to train on and waits for this one: a sample that adds a gradient of 0.
            positions = [min(shares[number], key=rollout_data["total_lengths"].__getitem__)]
        steps.append(Step(number, positions, max(float(everything), 1.0), float(weight) or 1.0, stand_in))
    skipped = int(sum(samples - some for samples, some, _, _ in counts))
    return Plan(steps, skipped, sum(1 for step in steps if not step.positions))


def _counts(
    rollout_data: dict[str, Any],
    shares: Sequence[Sequence[int]],
    active: Sequence[Sequence[int]],
    objective: ObjectiveOptions,
    siblings: Siblings | None,
) -> list[list[float]]:
    """Return for each step this rank's samples, those that run, and what losses and metrics are divided by."""
    mask_sums = segment_sums(torch.cat(rollout_data["loss_masks"]), rollout_data["response_lengths"]).tolist()
    weights = mask_weights(rollout_data, mask_sums, objective)
    counted: Sequence[float] = mask_sums
    if not objective.calculate_per_token_loss:
        counted = siblings.firsts if siblings is not None else [1] * len(mask_sums)
    return [
        [len(share), len(runs), sum(counted[i] for i in share), sum(weights[i] for i in runs)]
        for share, runs in zip(shares, active, strict=True)
    ]


def add_loss_metrics(
    metrics: Metrics, results: Sequence[dict[str, Any]], step: Step, *, loss_weight: float, weight: float
) -> None:
    """Add what the loss reported for each micro-batch of a step: losses divided as their gradient is, other metrics as
    means over the rollouts with unmasked tokens that ran, the largest of those that are maxima.

    `loss_weight` averages over all steps of the rollout (the loss of a skipped step is exactly 0), `weight` over those
    that run (of other metrics a skipped step has none, and neither has a rank with a stand-in).
    """
    for name, value in (item for result in results for item in result.items()):
        if step.stand_in and name not in LOSSES:
            continue
        scale = loss_weight / step.loss_denominator if name in LOSSES else weight / step.metric_denominator
        metrics.add(name, value if is_max(name) else value * scale)


def report_metrics(numbers: dict[str, float], trained_steps: int) -> dict[str, float]:
    """Return the metrics of a report from totals over ranks, names prefixed."""
    named = count_zero_gradients(finish_advantage_metrics(finish_mismatch(numbers)))
    if not trained_steps:
        named |= {"loss": 0.0, "tokens": 0.0}
    return {f"train/{name}": float(value) for name, value in sorted(named.items())}
