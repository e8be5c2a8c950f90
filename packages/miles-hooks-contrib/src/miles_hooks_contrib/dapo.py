"""DAPO's dynamic sampling: train on prompts that are answered rightly now and then (arXiv 2503.14476, section 3.2).

    0 < |{ i : answer i is right }| < G        for a group of G answers to one prompt

A group that is all right or all wrong has no advantage: it costs a place in the batch and pulls in no direction. The
loop samples another prompt for each one dropped, so that every batch is full of groups that train.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api import DynamicFilterOutput
from miles_api.errors import SampleError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["DapoFilterOptions", "keep_mixed_groups"]


class DapoFilterOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the filter takes for a right answer."""

    dapo_accuracy_key: str | None = None
    """With dict rewards, the entry that says whether an answer is right; default: --reward-key, or the plain reward.
    Name it where that reward is shaped: a group that is all wrong at different lengths is all wrong."""
    dapo_right_at: float = 1.0
    """The least accuracy of a right answer."""


def keep_mixed_groups(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Keep a group that has right and wrong answers; drop the others as `all_right` or `all_wrong`.

    Called once a group, after scoring. Raises `SampleError` where a reward lacks `--dapo-accuracy-key`.
    """
    right = [accuracy >= args.dapo_right_at for accuracy in _accuracies(args, samples)]
    if all(right):
        return DynamicFilterOutput(keep=False, reason="all_right")
    if not any(right):
        return DynamicFilterOutput(keep=False, reason="all_wrong")
    return DynamicFilterOutput(keep=True)


keep_mixed_groups.options = DapoFilterOptions  # type: ignore[attr-defined]


def _accuracies(args: Args, samples: list[Sample]) -> Iterable[float]:
    key = args.dapo_accuracy_key
    if key is None:
        return [sample.get_reward_value(args) for sample in samples]
    lacking = [sample for sample in samples if not isinstance(sample.reward, dict) or key not in sample.reward]
    if lacking:
        raise SampleError(
            f"--dapo-accuracy-key {key}: the reward of sample {lacking[0].index} is {lacking[0].reward!r}; expected a "
            "dict with that entry. Name an entry that the reward hook gives, or leave the flag out"
        )
    return [float(sample.reward[key]) for sample in samples]  # type: ignore[index]
