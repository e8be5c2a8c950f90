"""Groups are kept by their share of right answers."""

import pytest

from miles_api.errors import ConfigError, SampleError
from miles_api.testing import hook_args, make_group
from miles_hooks_contrib.difficulty_filter import FittingDifficulty


def decision(rewards, **options):
    group = make_group(len(rewards))
    for sample, reward in zip(group, rewards, strict=True):
        sample.reward = reward
    output = FittingDifficulty()(hook_args(FittingDifficulty, **options), group)
    return output.keep, output.reason


def test_the_window_includes_its_ends():
    assert decision([1.0, 0, 0, 0, 0]) == (True, None)
    assert decision([1.0, 1, 1, 1, 0]) == (True, None)
    assert decision([1.0, 0, 0, 0, 0, 0]) == (False, "too_hard")
    assert decision([1.0, 1, 1, 1, 1, 0]) == (False, "too_easy")


def test_a_narrow_window_takes_what_a_wide_one_leaves():
    assert decision([1.0, 1, 0, 0], difficulty_low=0.5, difficulty_high=0.5) == (True, None)
    assert decision([1.0, 0, 0, 0], difficulty_low=0.5, difficulty_high=0.5) == (False, "too_hard")
    assert decision([1.0, 1, 1, 1], difficulty_low=0.0, difficulty_high=1.0) == (True, None)


def test_what_counts_as_right_is_an_option():
    assert decision([0.6, 0.6, 0.1, 0.1]) == (False, "too_hard")
    assert decision([0.6, 0.6, 0.1, 0.1], difficulty_right_at=0.5) == (True, None)


def test_accuracy_may_be_another_entry_than_the_reward_that_trains():
    rewards = [{"shaped": -1.0, "accuracy": 1.0}, {"shaped": 5.0, "accuracy": 0.0}]
    assert decision(rewards, reward_key="shaped") == (True, None)
    assert decision(rewards, reward_key="shaped", difficulty_high=0.4) == (False, "too_easy")
    rewards = [{"shaped": 1.0, "accuracy": 1.0}] * 2
    assert decision(rewards, reward_key="shaped", difficulty_accuracy_key="accuracy") == (False, "too_easy")


def test_an_accuracy_that_no_reward_has_is_an_error():
    with pytest.raises(SampleError, match="--difficulty-accuracy-key accuracy"):
        decision([1.0, 0.0], difficulty_accuracy_key="accuracy")


def test_samples_of_one_rollout_are_one_answer():
    group = make_group(3)
    for sample, reward, rollout in zip(group, [1.0, 1.0, 0.0], [0, 0, 1], strict=True):
        sample.reward, sample.rollout_id = reward, rollout
    args = hook_args(FittingDifficulty, difficulty_low=0.5, difficulty_high=0.5)
    assert FittingDifficulty()(args, group).keep


def test_a_window_that_no_group_fits_in_is_refused():
    with pytest.raises(ConfigError, match="no group would train"):
        hook_args(FittingDifficulty, difficulty_low=0.9)
