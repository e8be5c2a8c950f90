"""Is what a hook returned what its stub promises? Each error names the hook, the sample and the field."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError, counted
from miles_api.loading.plain import make_plain, plain_number
from miles_api.rollout_types import DynamicFilterOutput, flatten
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.rollout_types import Group

__all__ = [
    "checked_data",
    "checked_generation",
    "checked_groups",
    "checked_reward",
    "checked_rewards",
    "checked_samples",
    "checked_verdict",
    "require_numbers",
]

_PER_TOKEN = ("loss_mask", "rollout_log_probs", "teacher_log_probs")


def checked_generation(result: Any, sample: Sample, who: str) -> Sample | list[Sample]:
    """Return what a generate hook made of `sample`: plain values, lengths that agree, a status.

    A sample with a response that is still pending counts as completed: hooks that know no better leave it so.
    """
    items = result if isinstance(result, list) else [result]
    if not items:
        raise HookResultError(f"{who} returned no sample for sample {sample.index}")
    for item in items:
        if not isinstance(item, Sample):
            raise HookResultError(f"{who} returned {type(item).__name__} for sample {sample.index}, not a Sample")
        _check_types(item, who)
        make_plain(item, who)
        item.validate()
        if item.status == Status.PENDING:
            if item.response_length == 0:
                raise HookResultError(f"{who} returned sample {item.index} pending and without a response: status")
            item.status = Status.COMPLETED
    return result


def checked_samples(samples: list[Sample], who: str) -> None:
    """Make plain what a hook may have written to samples, and check that their per-token fields still agree."""
    for sample in samples:
        _check_types(sample, who)
        make_plain(sample, who)
        if not 0 <= sample.response_length <= len(sample.tokens):
            raise HookResultError(
                f"{who} left sample {sample.index} with response_length {sample.response_length} and "
                f"{len(sample.tokens)} tokens"
            )
        for field in _PER_TOKEN:
            column = getattr(sample, field)
            if column is not None and len(column) != sample.response_length:
                raise HookResultError(
                    f"{who} left sample {sample.index} with {len(column)} entries in {field} for "
                    f"{sample.response_length} response tokens"
                )


_KINDS = {
    "response": str, "metadata": dict, "train_metadata": dict, "weight_versions": list, "weight_version_starts": list,
    "engines": list,
}  # fmt: skip


def _check_types(sample: Sample, who: str) -> None:
    if type(sample.status) is not Status:
        if sample.status not in tuple(Status):
            raise HookResultError(f"{who} left sample {sample.index} with the status {sample.status!r}")
        sample.status = Status(sample.status)
    for field, kind in _KINDS.items():
        value = getattr(sample, field)
        if not isinstance(value, kind) and not (value is None and field == "train_metadata"):
            raise HookResultError(
                f"{who} left sample {sample.index} with {value!r:.80} as {field}, not a {kind.__name__}"
            )


def checked_reward(value: Any, sample: Sample, who: str, key: str | None) -> float | dict[str, float]:
    """Return a reward of plain finite numbers; a dict must hold `key`, the one that trains or is evaluated.

    That entry comes first: readers of a dict that know no key go by its first number.
    """
    if type(value) is float and value - value == 0:
        return value
    if not isinstance(value, dict):
        return plain_number(value, who, f"the reward of sample {sample.index}")
    if key is None or key not in value:
        wanted = "pick one with --reward-key" if key is None else f"--reward-key {key} is not among them"
        raise HookResultError(f"{who} gave sample {sample.index} the rewards {sorted(map(str, value))}: {wanted}")
    return {
        str(name): plain_number(part, who, f"the reward {name!r} of sample {sample.index}")
        for name, part in sorted(value.items(), key=lambda entry: entry[0] != key)
    }


def checked_verdict(verdict: Any, who: str) -> DynamicFilterOutput:
    """Return a filter's verdict; any object with `keep` and `reason` will do, and `keep` may be a NumPy or torch bool.

    Filters written for other stacks return their own class, and `std() > 0` of a tensor is a tensor.
    """
    bare = isinstance(verdict, bool) or not hasattr(verdict, "keep")
    keep = verdict if bare else verdict.keep
    if not isinstance(keep, bool) and hasattr(keep, "item") and getattr(keep, "ndim", 0) == 0:
        keep = keep.item()
    if not isinstance(keep, bool):
        raise HookResultError(f"{who} returned {verdict!r:.200}, not a verdict (a bool or DynamicFilterOutput)")
    reason = None if bare else getattr(verdict, "reason", None)
    return DynamicFilterOutput(keep=keep, reason=None if reason is None else str(reason))


def checked_data(groups: Any, count: int, size: int, who: str) -> list[Group]:
    """Return `count` groups of `size` samples each, as a data source has to hand them out."""
    if not isinstance(groups, list) or len(groups) != count:
        got = counted(len(groups), "group") if isinstance(groups, list) else type(groups).__name__
        raise HookResultError(f"{who} returned {got}; {count} {'was' if count == 1 else 'were'} asked for")
    for number, group in enumerate(groups):
        if not isinstance(group, list) or not all(isinstance(sample, Sample) for sample in flatten([group])):
            raise HookResultError(f"{who} returned a group (number {number}) that is not a list of Samples")
        if len(group) != size:
            raise HookResultError(
                f"{who} returned a group (number {number}) of {len(group)}; --n-samples-per-prompt is {size}"
            )
    return groups


def checked_groups(groups: Any, count: int, who: str) -> list[Group]:
    """Return the groups of a whole rollout: `count` of them, none empty, no sample in two places; sizes may differ."""
    if not isinstance(groups, list) or not all(isinstance(group, list) and group for group in groups):
        raise HookResultError(f"{who} returned something else than a list of groups, each a list of Samples")
    samples = flatten(groups)
    if not all(isinstance(sample, Sample) for sample in samples):
        raise HookResultError(f"{who} returned {counted(len(groups), 'group')} that are not all of Samples")
    if len(groups) != count:
        raise HookResultError(f"{who} returned {counted(len(groups), 'group')}; --rollout-batch-size is {count}")
    if len({id(sample) for sample in samples}) < len(samples):
        raise HookResultError(f"{who} returned one Sample object in two places: copy it")
    return groups


def checked_rewards(result: Any, samples: list[Sample], who: str) -> tuple[list[float], list[float]]:
    """Return `(raw_rewards, rewards)` of a post-processing as plain finite floats, one for each sample."""
    if not isinstance(result, tuple | list) or len(result) != 2:  # noqa: PLR2004  the stub's pair
        raise HookResultError(f"{who} returned {type(result).__name__}, not (raw_rewards, rewards)")
    raw, rewards = (_floats(part, samples, who, name) for part, name in zip(result, ("raw_rewards", "rewards")))  # noqa: B905
    return raw, rewards


def _floats(values: Any, samples: list[Sample], who: str, name: str) -> list[float]:
    values = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(values, list | tuple) or len(values) != len(samples):
        got = f"{len(values)} {name}" if isinstance(values, list | tuple) else f"{type(values).__name__} as {name}"
        raise HookResultError(f"{who} returned {got} for {counted(len(samples), 'sample')}")
    return [
        value
        if type(value) is float and value - value == 0
        else plain_number(value, who, f"{name} of sample {sample.index}")
        for value, sample in zip(values, samples, strict=True)
    ]


def require_numbers(metrics: dict[str, float], who: str) -> None:
    """Make plain what a log hook added to the metrics of its rollout: finite numbers."""
    for name, value in metrics.items():
        metrics[name] = plain_number(value, who, f"the metric {name!r}")
