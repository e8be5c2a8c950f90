"""Optimizer steps that cannot change the weights, and why: they look like training and are not."""

# ruff: noqa: N803, N806  the shape suffix: R response tokens

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from miles_train.metrics import Metrics
    from miles_train.objective import Step
    from miles_train.seen import Seen

__all__ = ["UNCUT", "ZERO_GRADIENT_PREFIXES", "count_zero_gradients", "note_skipped_steps", "note_zero_gradient"]

UNCUT = "uncut_advantage_max"
"""What the policy loss reports of each micro-batch beside its metrics: the largest advantage, as a positive number, of
an unmasked token that clipping leaves a gradient."""
ZERO_GRADIENT_PREFIXES = ("zero_gradient/", "zero_step_")
"""How names of metrics begin that are made here; no hook's metric may begin so."""
_FACT = re.compile(r"zero_step_(\d+)_(\w+)")


def note_zero_gradient(
    metrics: Metrics,
    number: int,
    *,
    norm: float,
    rate: float,
    seen: Sequence[Seen],
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Note what is known of a step whose gradient norm or learning rate was 0; called after each step on every rank.

    `seen` and `results` are what this rank's micro-batches showed and reported, empty before the last pipeline stage.
    The facts add up over ranks in `metrics` until `count_zero_gradients`.
    """
    if norm != 0 and rate != 0:
        return
    metrics.add(_fact(number, "rate_max"), rate)
    for one in seen:
        kept_R = torch.cat(one.batch["loss_masks"]) != 0
        metrics.add(_fact(number, "tokens"), kept_R.sum())
        if "advantages" in one.batch:
            metrics.add(_fact(number, "advantage_max"), _largest(torch.cat(one.batch["advantages"]) * kept_R))
        for pull_R in one.pulls:
            metrics.add(_fact(number, "pull_max"), _largest(pull_R))
    for result in results:
        if UNCUT in result:
            metrics.add(_fact(number, "uncut_max"), result[UNCUT])


def note_skipped_steps(
    metrics: Metrics, steps: Sequence[Step], rollout_data: Mapping[str, Any], shares: Sequence[Sequence[int]]
) -> None:
    """Note the steps that --skip-zero-advantage leaves out as a whole; `shares` has this rank's samples of each."""
    for step in steps:
        if not step.positions:
            masks = [rollout_data["loss_masks"][i] for i in shares[step.number]]
            metrics.add(_fact(step.number, "rate_max"), 1.0)
            metrics.add(_fact(step.number, "tokens"), (torch.cat(masks) != 0).sum() if masks else 0.0)
            metrics.add(_fact(step.number, "advantage_max"), 0.0)


def count_zero_gradients(numbers: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics with what was noted, over all ranks, made into counts: `zero_gradient_steps`, and for those
    there were `zero_gradient/<cause>`."""
    steps: dict[str, dict[str, float]] = {}
    named = {}
    for name, value in numbers.items():
        match = _FACT.fullmatch(name)
        if match:
            steps.setdefault(match[1], {})[match[2]] = value
        elif name != UNCUT:
            named[name] = value
    causes = Counter(_cause(facts) for facts in steps.values())
    return (
        named
        | {"zero_gradient_steps": len(steps)}
        | {f"zero_gradient/{cause}": count for cause, count in causes.items()}
    )


def _cause(facts: Mapping[str, float]) -> str:
    """Return the first that holds, as `view.metric_words` names it."""
    tests = {
        "masked": not facts.get("tokens"),
        "learning_rate": facts["rate_max"] == 0,
        "zero_advantages": facts.get("advantage_max") == 0,
        "lost": facts.get("pull_max", 0.0) > 0,
        "clipped": facts.get("uncut_max") == 0,
    }
    return next((cause for cause, holds in tests.items() if holds), "no_gradient")


def _fact(number: int, name: str) -> str:
    return f"zero_step_{number}_{name}"


def _largest(values_R: Tensor) -> Tensor:
    return values_R.abs().amax() if len(values_R) else values_R.new_zeros(())
