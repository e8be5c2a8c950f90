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


def normalize_rewards(args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Return `(raw, normalised)`; groups are told by `group_index` and may have any size.

    With `--rewards-normalization` each group is centred, with `--grpo-std-normalization` also divided by its sample
    standard deviation. A group whose rewards are all equal, a group of one included, gets exactly 0.
    """
    raw = [sample.get_reward_value(args) for sample in samples]
    if not args.rewards_normalization:
        return raw, list(raw)
    members: dict[int | None, list[int]] = defaultdict(list)
    for position, sample in enumerate(samples):
        members[sample.group_index].append(position)
    normalised = [0.0] * len(samples)
    for positions in members.values():
        scores = [raw[position] for position in positions]
        if min(scores) == max(scores):
            continue
        mean = math.fsum(scores) / len(scores)
        spread = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / (len(scores) - 1))
        scale = spread + _EPSILON if args.grpo_std_normalization else 1.0
        for position, score in zip(positions, scores, strict=True):
            normalised[position] = (score - mean) / scale
    return raw, normalised
