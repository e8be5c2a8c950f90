"""Stock dynamic filters, by short name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import DynamicFilterOutput
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["check_no_aborted", "check_reward_nonzero_std"]


def check_reward_nonzero_std(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Drop groups whose rewards are all equal: they carry no gradient (DAPO, arXiv 2503.14476)."""
    rewards = [sample.get_reward_value(args) for sample in samples]
    if max(rewards) > min(rewards):
        return DynamicFilterOutput(keep=True)
    return DynamicFilterOutput(keep=False, reason=f"zero_std_{round(rewards[0], 1)}")


def check_no_aborted(args: Args, samples: list[Sample], **kwargs: Any) -> DynamicFilterOutput:
    """Drop groups with an aborted sample."""
    if any(sample.status == Status.ABORTED for sample in samples):
        return DynamicFilterOutput(keep=False, reason="aborted")
    return DynamicFilterOutput(keep=True)
