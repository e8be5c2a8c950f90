"""RLOO's baseline: compare each answer with the mean of the others to its prompt (arXiv 2402.14740).

    A_i = r_i − 1 / (G − 1) Σ_{j ≠ i} r_j        for a group of G answers to one prompt

Unlike the mean of the whole group, the baseline does not depend on the answer it is subtracted from, so that the
policy gradient stays unbiased; A_i is G / (G − 1) times the reward less the group's mean. A `reward_post_process` hook:
there groups are whole, whatever ranks and micro-batches they are spread over later.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import ConfigError
from miles_hooks_contrib.rollout_groups import group_rollouts, mean, refuse_second_baseline, rollout_rewards

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["LeaveOneOut"]


class LeaveOneOut:
    """Subtract from each reward the mean reward of the group's other rollouts.

    Groups may have any size. Samples fanned out of one rollout count once, with their mean reward, and share a
    baseline. A group of one rollout has nothing to compare with: 0.
    """

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` beside an estimator that has a baseline of its own."""
        if problem := refuse_second_baseline(args, "leave_one_out"):
            raise ConfigError(problem)

    def __call__(self, args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
        """Return the rewards as they were, and less their baselines. Called once a rollout."""
        rewards = [sample.get_reward_value(args) for sample in samples]
        advantages = [0.0] * len(samples)
        for rollouts in group_rollouts(samples):
            scores = rollout_rewards(rewards, rollouts)
            if len(scores) == 1:
                continue
            for place, positions in enumerate(rollouts):
                baseline = mean(scores[:place] + scores[place + 1 :])
                for position in positions:
                    advantages[position] = rewards[position] - baseline
        return rewards, advantages
