"""The default reward post-processing: centre and scale within each group (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["normalize_rewards"]

_EPSILON = 1e-6
_ROUNDING = 1e-9
"""How far apart, relative to rewards, means are that differ by rounding alone."""


def normalize_rewards(args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Return `(raw, normalised)`; groups are told by `group_index` and may have any size.

    With `--rewards-normalization` each group is centred, with `--grpo-std-normalization` also divided by its sample
    standard deviation. Mean and deviation are of its rollouts: samples fanned out of one (`rollout_id`) count once,
    with their mean reward, and each gets its own reward less that mean. A group whose rewards are all equal, one with
    one rollout, and one whose rollouts have no deviation to divide by gets exactly 0.
    """
    raw = [sample.get_reward_value(args) for sample in samples]
    if not args.rewards_normalization:
        return raw, list(raw)
    members: dict[int | None, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        members[sample.group_index].append(position)
    normalised = [0.0] * len(samples)
    for positions in members.values():
        own = [raw[position] for position in positions]
        scores = _rollout_scores([samples[position].rollout_id for position in positions], own)
        if len(scores) == 1 or min(own) == max(own):
            continue
        mean = math.fsum(scores) / len(scores)
        scale = 1.0
        if args.grpo_std_normalization:
            # A mean of siblings may be rounded: rollouts that are equal but for that have no spread to divide by.
            if scores is not own and max(scores) - min(scores) <= _ROUNDING * max(map(abs, own)):
                continue
            scale = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1)) + _EPSILON
        for position, score in zip(positions, own, strict=True):
            normalised[position] = (score - mean) / scale
    return raw, normalised


def _rollout_scores(rollouts: list[int | None], scores: list[float]) -> list[float]:
    """Return the mean reward of each rollout; the very same list where no rollout has several samples, as none has
    without a `rollout_id`."""
    if None in rollouts or len(set(rollouts)) == len(rollouts):
        return scores
    by: dict[int | None, list[float]] = defaultdict(list)
    for rollout, score in zip(rollouts, scores, strict=True):
        by[rollout].append(score)
    return [math.fsum(own) / len(own) for own in by.values()]
