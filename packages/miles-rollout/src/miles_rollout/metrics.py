"""What is reported of every rollout."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from miles_api.errors import SampleError, counted
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["HookCounts", "reward_parts", "rollout_metrics"]

Totals = dict[str, dict[str, float]]
"""By hook and by what is counted."""

_COUNTS = ("errors", "timeouts", "retries")
_SAID = (
    "turns", "tool_calls", "malformed_tool_calls", "tool_timeouts", "turn_timeouts", "observation_tokens",
)  # fmt: skip
"""What the metadata of samples count of their conversation."""


def rollout_metrics(args: Args, samples: list[Sample]) -> dict[str, float]:
    """Return scalars of one rollout: rewards and their parts, lengths in tokens, shares of truncated samples and of
    equal groups; without what tells of rewards where training is supervised."""
    size = len(samples)
    lengths = [sample.response_length for sample in samples]
    return {
        # Supervised samples are not scored.
        **({} if args.loss_type == "sft_loss" else _rewards(args, samples)),
        "rollout/response_length": sum(lengths) / size,
        "rollout/response_length_max": float(max(lengths)),
        "rollout/tokens": float(sum(lengths)),
        "rollout/samples": float(size),
        "rollout/truncated": sum(sample.status == Status.TRUNCATED for sample in samples) / size,
        "rollout/removed": sum(sample.remove_sample for sample in samples) / size,
        **_conversations(samples),
    }


def _rewards(args: Args, samples: list[Sample]) -> dict[str, float]:
    rewards = [sample.get_reward_value(args) for sample in samples]
    groups: dict[int | None, set[float]] = defaultdict(set)
    for sample, value in zip(samples, rewards, strict=True):
        groups[sample.group_index].add(value)
    return {
        "rollout/reward": sum(rewards) / len(rewards),
        "rollout/equal_groups": sum(len(values) == 1 for values in groups.values()) / len(groups),
        **{f"rollout/reward/{name}": mean for name, mean in reward_parts(samples, args.reward_key).items()},
    }


def _conversations(samples: list[Sample]) -> dict[str, float]:
    """Return the means over rollouts of what samples count of their conversations; nothing where none does."""
    rollouts = len({id(sample) if sample.rollout_id is None else sample.rollout_id for sample in samples})
    found = {name: [n for s in samples if type(n := s.metadata.get(name)) is int] for name in _SAID}
    return {f"rollout/{name}": sum(counts) / rollouts for name, counts in found.items() if counts}


def reward_parts(samples: list[Sample], key: str | None) -> dict[str, float]:
    """Return the mean of each entry of dict rewards but `key`, which is the reward itself.

    Samples whose reward is a number have no parts. Raises `SampleError` for a dict that lacks what others have.
    """
    scored = [sample for sample in samples if isinstance(sample.reward, dict)]
    columns: dict[str, list[float]] = defaultdict(list)
    for sample in scored:
        for name, value in sample.reward.items():  # type: ignore[union-attr]
            columns[name].append(value)
    for name, column in columns.items():
        if len(column) < len(scored):
            lacking = [sample.index for sample in scored if name not in sample.reward]  # type: ignore[operator]
            raise SampleError(
                f"the rewards of {counted(len(column), 'sample')} have a part {name!r}, and those of {len(lacking)} "
                f"lack it, such as samples {lacking[:8]}: a reward hook gives every sample the same parts, so let it "
                f"return {name!r}: 0.0 where there is nothing to score"
            )
    return {name: sum(column) / len(column) for name, column in columns.items() if name != key}


class HookCounts:
    """Counts what each hook did from one rollout to the next, also across a checkpoint."""

    def __init__(self) -> None:
        self._before: Totals = {}
        """The totals of the last rollout."""
        self._loaded: Totals = {}
        """The totals of the run that is continued."""

    def metrics(self, report: list[dict[str, Any]]) -> dict[str, float]:
        """Return `hooks/<hook>/calls|seconds|errors|timeouts|retries` since the last call; `report` counts from 0.

        A default hook is silent until it fails; a configured one gives calls and seconds, and counts once they are not
        0.
        """
        totals, metrics = self._totals(report), {}
        configured = {line["hook"] for line in report if line["configured"]}
        for name, sums in sorted(totals.items()):
            if not ((name in configured and sums["calls"]) or any(sums[count] for count in _COUNTS)):
                continue
            earlier = self._before.get(name, {})
            for count, total in sums.items():
                if count not in _COUNTS or total:
                    metrics[f"hooks/{name}/{count}"] = total - earlier.get(count, 0.0)
        self._before = totals
        return metrics

    def state_dict(self, report: list[dict[str, Any]]) -> dict[str, Totals]:
        """Return what a checkpoint holds; `report` as for `metrics`."""
        return {"totals": self._totals(report), "before": self._before}

    def load_state_dict(self, state: dict[str, Totals]) -> None:
        """Take the counts of the run that is continued; its hooks have not been called in this process yet."""
        self._loaded, self._before = state["totals"], state["before"]

    def _totals(self, report: list[dict[str, Any]]) -> Totals:
        totals = {name: dict(sums) for name, sums in self._loaded.items()}
        # The parts of a weighted reward ran within it.
        for line in (line for line in report if "part_of" not in line):
            sums = totals.setdefault(line["hook"], dict.fromkeys(("calls", "seconds", *_COUNTS), 0.0))
            for count in sums:
                sums[count] += line[count]
        return totals
