"""Pass@k advantages: by hand, by counting every team, and at sizes where binomials overflow a float."""

import itertools
import math
import statistics
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.errors import ConfigError
from miles_api.testing import hook_args, make_group
from miles_hooks_contrib.check import check
from miles_hooks_contrib.pass_at_k import PassAtK, pass_at_k_advantages

sizes = st.integers(2, 7).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n), st.integers(1, n)))


def scored(*rewards, group_index=0, rollouts=None):
    group = make_group(len(rewards), group_index)
    for place, (sample, reward) in enumerate(zip(group, rewards, strict=True)):
        sample.reward = reward
        sample.rollout_id = rollouts[place] if rollouts else sample.rollout_id
    return group


def by_counting(count, wrong, k):
    """Return the mean standardised success of the teams of a right and of a wrong answer, team by team."""
    right = count - wrong
    teams = list(itertools.combinations(range(count), k))
    wins = {team: float(any(member < right for member in team)) for team in teams}
    mean, spread = statistics.fmean(wins.values()), statistics.pstdev(wins.values())
    if spread == 0:
        return 0.0, 0.0
    of = [statistics.fmean((wins[team] - mean) / spread for team in teams if i in team) for i in range(count)]
    return of[0] if right else 0.0, of[-1] if wrong else 0.0


def test_one_right_answer_of_four_in_teams_of_two():
    # Half of the six teams hold it: P = 1/2 and spread 1/2. A wrong answer is in three teams, one of which wins.
    assert pass_at_k_advantages(4, 3, 2) == pytest.approx((1.0, -1 / 3))
    assert pass_at_k_advantages(4, 3, 2, scaled=False) == pytest.approx((0.5, -1 / 6))


def test_teams_that_all_win_or_all_lose_pull_in_no_direction():
    assert pass_at_k_advantages(8, 3, 4) == (0.0, 0.0)  # three wrong answers make no team of four
    assert pass_at_k_advantages(8, 8, 4) == (0.0, 0.0)
    assert pass_at_k_advantages(8, 0, 4) == (0.0, 0.0)


@given(sizes)
def test_it_is_what_counting_every_team_gives(size):
    assert pass_at_k_advantages(*size) == pytest.approx(by_counting(*size), abs=1e-12)


@given(sizes)
def test_the_advantages_of_a_group_add_up_to_nothing(size):
    count, wrong, k = size
    right_one, wrong_one = pass_at_k_advantages(count, wrong, k)
    assert (count - wrong) * right_one + wrong * wrong_one == pytest.approx(0, abs=1e-9)


def test_teams_of_one_are_grpo():
    rewards = [1.0, 0.0, 0.0, 0.0, 1.0]
    mean, spread = statistics.fmean(rewards), statistics.pstdev(rewards)
    assert pass_at_k_advantages(5, 3, 1) == pytest.approx(((1 - mean) / spread, -mean / spread))


def test_groups_whose_binomials_overflow_a_float_are_exact():
    count, wrong, k = 4096, 4095, 1024
    # One right answer: a team has it with probability k / count.
    success = k / count
    sigma = math.sqrt(success * (1 - success))
    right_one, wrong_one = pass_at_k_advantages(count, wrong, k)
    assert math.comb(count, k) > 10**308
    assert right_one == pytest.approx((1 - success) / sigma, rel=1e-14)
    assert wrong_one == pytest.approx(((k - 1) / (count - 1) - success) / sigma, rel=1e-12)


def test_groups_are_told_apart_and_a_small_one_is_one_team():
    args = hook_args(PassAtK, n_samples_per_prompt=4, pass_at_k=2)
    samples = [*scored(1.0, 0.0, 0.0, 0.0), *scored(0.0, group_index=1), *scored(1.0, 1.0, 0.0, 0.0, group_index=2)]
    raw, advantages = PassAtK(args)(args, samples)
    assert raw == [sample.reward for sample in samples]
    # Two right of four: 5 of 6 teams win; a wrong answer's three teams win twice.
    sigma = math.sqrt(5 / 36)
    third = [(1 / 6) / sigma] * 2 + [(2 / 3 - 5 / 6) / sigma] * 2
    assert advantages == pytest.approx([1, -1 / 3, -1 / 3, -1 / 3, 0, *third])


def test_samples_of_one_rollout_are_one_member():
    args = hook_args(PassAtK, n_samples_per_prompt=2, pass_at_k=1)
    _, advantages = PassAtK(args)(args, scored(1.0, 1.0, 0.0, rollouts=[3, 3, 4]))
    assert advantages == pytest.approx([1.0, 1.0, -1.0])


def test_the_least_reward_of_a_right_answer_is_an_option():
    args = hook_args(PassAtK, n_samples_per_prompt=2, pass_at_k=1, pass_at_k_right_at=0.5)
    assert PassAtK(args)(args, scored(0.6, -1.0))[1] == pytest.approx([1.0, -1.0])


def test_a_run_may_leave_the_spread_out():
    args = hook_args(PassAtK, n_samples_per_prompt=4, pass_at_k=2, pass_at_k_std_normalization=False)
    assert PassAtK(args)(args, scored(1.0, 0.0, 0.0, 0.0))[1] == pytest.approx([0.5, -1 / 6, -1 / 6, -1 / 6])


def test_a_team_larger_than_a_group_is_refused():
    with pytest.raises(ConfigError, match="--n-samples-per-prompt is 3"):
        PassAtK(hook_args(PassAtK, pass_at_k=4))


def test_an_estimator_with_a_baseline_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="--advantage-estimator rloo"):
        PassAtK(hook_args(PassAtK, pass_at_k=2, advantage_estimator="rloo"))


def test_what_it_refuses_is_known_before_a_run_starts():
    args = hook_args(PassAtK, pass_at_k=4, custom_reward_post_process_path="pass_at_k")
    assert "--n-samples-per-prompt is 3" in "".join(check(SimpleNamespace(args=args, sources={})))
