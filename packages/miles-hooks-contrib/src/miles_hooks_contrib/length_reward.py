"""Kimi k1.5's length reward: of the right answers to a prompt prefer the short ones (arXiv 2501.12599, section 2.3.3).

With ℓ_i the length of answer i, and ℓ_min, ℓ_max the shortest and longest of its group:

    λ_i = 1/2 − (ℓ_i − ℓ_min) / (ℓ_max − ℓ_min)
    reward_i += weight × (λ_i if answer i is right, else min(0, λ_i))        0 where ℓ_min = ℓ_max

Lengths are compared within a group, so that no scale has to be chosen, and hard prompts may have long answers. Wrong
answers win nothing by being short. A `reward_post_process` hook: whatever scored the samples, dynamic filters and
evaluation see the plain reward, and the run's own normalisation gets the shaped one.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated

import msgspec

from miles_api.loading.load import provider
from miles_hooks_contrib.rollout_groups import group_rollouts, rollout_rewards

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["LengthOptions", "LengthReward"]


class LengthOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How much length counts, and what a right answer is."""

    length_weight: Annotated[float, msgspec.Meta(gt=0)] = 0.5
    """How much of the reward length is: a right answer gains or loses up to half of this. Below 1, the longest right
    answer stays ahead of every wrong one, where rewards are 0 and 1."""
    length_right_at: float = 1.0
    """The least reward of a right answer."""


class LengthReward:
    """Add the length reward to each reward, and hand over to the default reward post-processing.

    Samples fanned out of one rollout have its length: that of all of them together.
    """

    options = LengthOptions

    def __init__(self, args: Args) -> None:
        self._weight, self._right_at = args.length_weight, args.length_right_at
        self._normalise = provider("miles.defaults", "reward_post_process")

    def __call__(self, args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
        """Return the plain rewards, and the shaped ones after post-processing. Called once a rollout."""
        plain = [sample.get_reward_value(args) for sample in samples]
        # Stand-ins: other hooks, logs and dumps keep the samples that were scored.
        shaped = [copy.copy(sample) for sample in samples]
        for stand_in, reward, bonus in zip(shaped, plain, self._bonuses(samples, plain), strict=True):
            stand_in.reward = reward + self._weight * bonus
        return plain, self._normalise(args, shaped)[1]

    def _bonuses(self, samples: list[Sample], rewards: list[float]) -> list[float]:
        bonuses = [0.0] * len(samples)
        for rollouts in group_rollouts(samples):
            # Tokens that the model did not write, a tool's output, are not counted.
            lengths = [sum(samples[position].effective_response_length for position in own) for own in rollouts]
            right = [score >= self._right_at for score in rollout_rewards(rewards, rollouts)]
            for positions, bonus in zip(rollouts, length_bonuses(lengths, right), strict=True):
                for position in positions:
                    bonuses[position] = bonus
        return bonuses


def length_bonuses(lengths: list[int], right: list[bool]) -> list[float]:
    """Return the length reward of each answer of one group, −1/2 to 1/2."""
    shortest, spread = min(lengths), max(lengths) - min(lengths)
    if spread == 0:
        return [0.0] * len(lengths)
    preferences = [0.5 - (length - shortest) / spread for length in lengths]
    return [value if ok else min(0.0, value) for value, ok in zip(preferences, right, strict=True)]
