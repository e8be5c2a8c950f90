"""Pass@k as the objective: an answer counts by the teams of k answers that it makes win (arXiv 2508.10751).

Of N answers to a prompt, W wrong, every k form a team that succeeds if one of them is right. Averaged over all teams:

    P       = 1 − C(W, k) / C(N, k)                      success of a team,     σ = √(P (1 − P))
    A_right = (1 − P) / σ                                teams of a right answer always succeed
    A_wrong = (1 − C(W−1, k−1) / C(N−1, k−1) − P) / σ    a wrong one's succeed if another is right

Right answers to easy prompts, which k tries would find anyway, pull less, and wrong ones are pushed down less where
the others are right: the policy keeps looking for a second way. With k = 1 it is GRPO's advantage. Without the division
by σ (--no-pass-at-k-std-normalization) it is N / k times the unbiased estimate of pass@k's gradient, less P (arXiv
2505.15201).
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated

import msgspec

from miles_api.errors import ConfigError
from miles_hooks_contrib.rollout_groups import group_rollouts, refuse_second_baseline, rollout_rewards

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["PassAtK", "PassAtKOptions", "pass_at_k_advantages"]


class PassAtKOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How large a team is, and what a right answer is."""

    pass_at_k: Annotated[int, msgspec.Meta(ge=1)]
    """Answers in a team, at most --n-samples-per-prompt."""
    pass_at_k_right_at: float = 1.0
    """The least reward of a right answer."""
    pass_at_k_std_normalization: bool = True
    """Divide by the spread of the teams' success, σ. Without it, prompts count by how much k tries can still gain."""


def pass_at_k_advantages(count: int, wrong: int, k: int, *, scaled: bool = True) -> tuple[float, float]:
    """Return the advantages of a right and of a wrong answer among `count`, `wrong` of them wrong.

    Exact: binomials are integers, and only the results are rounded. Both are 0 where all teams fare alike, and of a
    kind of answer that there is none of. `k` above `count` is one team of all.
    """
    k = min(k, count)
    teams, failing = math.comb(count, k), math.comb(wrong, k)
    if failing in (0, teams):
        return 0.0, 0.0
    failure = Fraction(failing, teams)
    own_failure = Fraction(math.comb(wrong - 1, k - 1), math.comb(count - 1, k - 1))
    sigma = math.sqrt(failure * (1 - failure)) if scaled else 1.0
    return float(failure) / sigma, float(failure - own_failure) / sigma


class PassAtK:
    """Replace rewards by pass@k advantages within each group, of any size.

    Samples fanned out of one rollout count once, with their mean reward, and get the same advantage.
    """

    options = PassAtKOptions

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` for teams larger than a group, and beside an estimator with a baseline of its own."""
        if problem := refuse_second_baseline(args, "pass_at_k"):
            raise ConfigError(problem)
        self._k, self._right_at, self._scaled = (
            args.pass_at_k,
            args.pass_at_k_right_at,
            args.pass_at_k_std_normalization,
        )
        if self._k > args.n_samples_per_prompt:
            raise ConfigError(
                f"--pass-at-k {self._k}: a team of {self._k} needs as many answers to a prompt, and "
                f"--n-samples-per-prompt is {args.n_samples_per_prompt}: raise it, or lower --pass-at-k"
            )

    def __call__(self, args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
        """Return the rewards as they were, and the advantages. Called once a rollout."""
        rewards = [sample.get_reward_value(args) for sample in samples]
        advantages = [0.0] * len(samples)
        for rollouts in group_rollouts(samples):
            right = [score >= self._right_at for score in rollout_rewards(rewards, rollouts)]
            of = pass_at_k_advantages(len(right), right.count(False), self._k, scaled=self._scaled)
            for positions, is_right in zip(rollouts, right, strict=True):
                for position in positions:
                    advantages[position] = of[0] if is_right else of[1]
        return rewards, advantages
