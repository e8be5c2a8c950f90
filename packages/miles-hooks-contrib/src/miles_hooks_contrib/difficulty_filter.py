"""Online difficulty filtering: train on prompts that the policy of the moment gets right at a fitting rate.

    keep the group  ⇔  low ≤ right answers / answers ≤ high

(arXiv 2504.03380.) What a prompt can teach is bounded from below by the variance of its success, p (1 − p): most at one
half, nothing at 0 and 1, and little beside them. `dapo` keeps everything strictly between; this keeps a window.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from miles_api import DynamicFilterOutput
from miles_api.errors import SampleError
from miles_hooks_contrib.rollout_groups import group_rollouts, rollout_rewards

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["DifficultyOptions", "FittingDifficulty"]

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


class DifficultyOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Which shares of right answers train."""

    difficulty_low: _Share = 0.2
    """The least share of right answers in a group that trains; below it the prompt is too hard."""
    difficulty_high: _Share = 0.8
    """The largest share of right answers in a group that trains; above it the prompt is too easy."""
    difficulty_right_at: float = 1.0
    """The least accuracy of a right answer."""
    difficulty_accuracy_key: str | None = None
    """With dict rewards, the entry that is the accuracy; default: --reward-key, or the plain reward."""

    def __post_init__(self) -> None:
        """Refuse a window that no group fits in."""
        if self.difficulty_low > self.difficulty_high:
            raise ValueError(
                f"--difficulty-low {self.difficulty_low:g} is above --difficulty-high {self.difficulty_high:g}: "
                "no group would train"
            )


class FittingDifficulty:
    """Keep a group whose share of right answers lies in the window; drop others as `too_hard` or `too_easy`."""

    options = DifficultyOptions

    def __call__(self, args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
        """Decide on one group. Called after scoring.

        Samples fanned out of one rollout are one answer, with their mean accuracy. Raises `SampleError` where a reward
        lacks `--difficulty-accuracy-key`.
        """
        accuracies = [_accuracy(args, sample) for sample in samples]
        [rollouts] = group_rollouts(samples)
        right = [value >= args.difficulty_right_at for value in rollout_rewards(accuracies, rollouts)]
        share = sum(right) / len(right)
        if share < args.difficulty_low:
            return DynamicFilterOutput(keep=False, reason="too_hard")
        if share > args.difficulty_high:
            return DynamicFilterOutput(keep=False, reason="too_easy")
        return DynamicFilterOutput(keep=True)


def _accuracy(args: Args, sample: Sample) -> float:
    key = args.difficulty_accuracy_key
    if key is None:
        return sample.get_reward_value(args)
    if not isinstance(sample.reward, dict) or key not in sample.reward:
        raise SampleError(
            f"--difficulty-accuracy-key {key}: the reward of sample {sample.index} is {sample.reward!r}; expected a "
            "dict with that entry. Name an entry that the reward hook gives, or leave the flag out"
        )
    return float(sample.reward[key])
