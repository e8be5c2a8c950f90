"""The rollouts of each group, told as the framework tells them: by `group_index`, and fan-outs by `rollout_id`."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["group_rollouts", "refuse_second_baseline", "rollout_rewards"]

_TAKES_REWARDS_AS_THEY_ARE = ("grpo", "gspo")


def group_rollouts(samples: Sequence[Sample]) -> list[list[list[int]]]:
    """Return groups of rollouts of positions in `samples`; groups may have any size.

    Samples that were fanned out of one rollout share it; in a group where any sample lacks a `rollout_id`, each is a
    rollout of its own.
    """
    groups: dict[int | None, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        groups[sample.group_index].append(position)
    return [_rollouts(samples, positions) for positions in groups.values()]


def _rollouts(samples: Sequence[Sample], positions: list[int]) -> list[list[int]]:
    if any(samples[position].rollout_id is None for position in positions):
        return [[position] for position in positions]
    rollouts: dict[int | None, list[int]] = defaultdict(list)
    for position in positions:
        rollouts[samples[position].rollout_id].append(position)
    return list(rollouts.values())


def rollout_rewards(rewards: Sequence[float], rollouts: list[list[int]]) -> list[float]:
    """Return the mean reward of each rollout."""
    return [mean([rewards[position] for position in positions]) for positions in rollouts]


def mean(values: Sequence[float]) -> float:
    """Return the mean; of equal values exactly that value, for what is left of it decides which samples pull."""
    return values[0] if min(values) == max(values) else math.fsum(values) / len(values)


def refuse_second_baseline(args: Args, name: str) -> str | None:
    """Return what is wrong where a hook's finished advantages would get a baseline, a critic or a discount on top."""
    estimator: Any = args.advantage_estimator
    if estimator in _TAKES_REWARDS_AS_THEY_ARE:
        return None
    return (
        f"--custom-reward-post-process-path {name} gives advantages, and --advantage-estimator {estimator} would make "
        f"advantages of them once more: expected {' or '.join(_TAKES_REWARDS_AS_THEY_ARE)}, or drop the hook"
    )
