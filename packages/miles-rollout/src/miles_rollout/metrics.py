"""What is reported of every rollout."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["rollout_metrics"]


def rollout_metrics(args: Args, samples: list[Sample]) -> dict[str, float]:
    """Return scalars of one rollout: rewards, lengths in tokens, shares of truncated samples and of equal groups."""
    size = len(samples)
    rewards = [sample.get_reward_value(args) for sample in samples]
    lengths = [sample.response_length for sample in samples]
    groups: dict[int | None, set[float]] = defaultdict(set)
    for sample, value in zip(samples, rewards, strict=True):
        groups[sample.group_index].add(value)
    return {
        "rollout/reward": sum(rewards) / size,
        "rollout/response_length": sum(lengths) / size,
        "rollout/response_length_max": float(max(lengths)),
        "rollout/tokens": float(sum(lengths)),
        "rollout/samples": float(size),
        "rollout/truncated": sum(sample.status == Status.TRUNCATED for sample in samples) / size,
        "rollout/removed": sum(sample.remove_sample for sample in samples) / size,
        "rollout/equal_groups": sum(len(values) == 1 for values in groups.values()) / len(groups),
    }
