"""What is reported of every rollout."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["hook_metrics", "rollout_metrics"]

_COUNTS = ("errors", "timeouts", "retries")


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


def hook_metrics(
    report: list[dict[str, Any]], before: dict[str, dict[str, float]]
) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Return `hooks/<hook>/calls|seconds|errors|timeouts|retries` since `before`, and the totals to pass next time.

    A default hook is silent until it fails; a configured one gives calls and seconds, and counts once they are not 0.
    """
    totals: dict[str, dict[str, float]] = {}
    shown: set[str] = set()
    for line in report:
        name = line["hook"]
        sums = totals.setdefault(name, dict.fromkeys(("calls", "seconds", *_COUNTS), 0.0))
        for count in sums:
            sums[count] += line[count]
        if (line["configured"] and line["calls"]) or any(sums[count] for count in _COUNTS):
            shown.add(name)
    metrics: dict[str, float] = {}
    for name in sorted(shown):
        earlier = before.get(name, {})
        for count, total in totals[name].items():
            if count not in _COUNTS or total:
                metrics[f"hooks/{name}/{count}"] = total - earlier.get(count, 0.0)
    return metrics, totals
