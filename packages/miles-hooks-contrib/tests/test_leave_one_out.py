"""RLOO's baseline as a reward post-processing hook."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.errors import ConfigError
from miles_api.testing import hook_args, make_group, make_sample
from miles_hooks_contrib.leave_one_out import LeaveOneOut


def scored(*rewards, group_index=0, rollouts=None):
    group = make_group(len(rewards), group_index)
    for place, (sample, reward) in enumerate(zip(group, rewards, strict=True)):
        sample.reward = reward
        sample.rollout_id = rollouts[place] if rollouts else sample.rollout_id
    return group


def advantages(samples):
    args = hook_args()
    return LeaveOneOut(args)(args, samples)[1]


def test_an_answer_is_compared_with_the_mean_of_the_others():
    assert advantages(scored(1.0, 0.0, 0.5)) == [0.75, -0.75, 0.0]


def test_groups_may_have_different_sizes_and_a_group_of_one_gets_nothing():
    samples = [*scored(1.0, 0.0), *scored(3.0, group_index=1), *scored(1.0, 1.0, 0.0, 0.0, group_index=2)]
    assert advantages(samples) == pytest.approx([1, -1, 0, 2 / 3, 2 / 3, -2 / 3, -2 / 3])


def test_samples_of_one_rollout_count_once_and_share_a_baseline():
    # The fan-out scores 0.5 on average; its siblings are compared with the other rollout, 0.
    samples = scored(1.0, 0.0, 0.0, rollouts=[7, 7, 8])
    assert advantages(samples) == [1.0, 0.0, -0.5]


def test_equal_rewards_pull_in_no_direction_whatever_their_rounding():
    assert advantages(scored(*[0.1] * 7)) == [0.0] * 7


def test_the_rewards_themselves_are_reported_as_they_were():
    args = hook_args()
    assert LeaveOneOut(args)(args, scored(1.0, 0.25))[0] == [1.0, 0.25]


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=9))
def test_it_is_the_centred_reward_by_the_share_of_the_others(rewards):
    size = len(rewards)
    mean = math.fsum(rewards) / size
    expected = [(reward - mean) * size / (size - 1) for reward in rewards]
    assert advantages(scored(*rewards)) == pytest.approx(expected, abs=1e-9)


def test_an_estimator_with_a_baseline_of_its_own_is_refused():
    with pytest.raises(ConfigError, match="--advantage-estimator rloo"):
        LeaveOneOut(hook_args(advantage_estimator="rloo"))


def test_it_agrees_with_the_estimator_rloo():
    estimators = pytest.importorskip("miles_train.estimators")
    samples = [
        *scored(1.0, 0.0, 0.5, 0.5, rollouts=[0, 0, 1, 2]),
        *scored(0.3, group_index=1, rollouts=[3]),
        *scored(0.1, 0.1, 0.9, 0.2, group_index=2, rollouts=[4, 5, 6, 7]),
    ]
    columns = {
        "rewards": [sample.reward for sample in samples],
        "group_indices": [sample.group_index for sample in samples],
        "rollout_ids": [sample.rollout_id for sample in samples],
    }
    baselines = estimators.with_baselines(columns, estimators.ESTIMATORS["rloo"])["baselines"]
    assert advantages(samples) == [r - b for r, b in zip(columns["rewards"], baselines, strict=True)]


def test_a_dict_reward_needs_its_key():
    args = hook_args(reward_key="accuracy")
    samples = [make_sample(reward={"accuracy": 1.0, "x": 9.0}), make_sample(rollout_id=1, reward={"accuracy": 0.0})]
    assert LeaveOneOut(args)(args, samples) == ([1.0, 0.0], [1.0, -1.0])
