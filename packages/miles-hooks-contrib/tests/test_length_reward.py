"""Of the right answers, the shorter ones are preferred, and nothing else sees the shaped reward."""

import pytest

from miles_api.testing import hook_args, make_group
from miles_hooks_contrib.length_reward import LengthReward, length_bonuses


def scored(answers, group_index=0):
    """Make a group from pairs of reward and response length."""
    group = make_group(len(answers), group_index)
    for sample, (reward, length) in zip(group, answers, strict=True):
        sample.reward, sample.tokens, sample.response_length = reward, [1] * (length + 2), length
        sample.rollout_log_probs = [0.0] * length
    return group


def test_right_answers_gain_by_shortness_and_wrong_ones_only_lose_by_length():
    assert length_bonuses([10, 20, 30, 10, 30], [True, True, True, False, False]) == [0.5, 0.0, -0.5, 0.0, -0.5]


def test_answers_of_one_length_are_left_alone():
    assert length_bonuses([7, 7, 7], [True, False, True]) == [0.0, 0.0, 0.0]


@pytest.fixture
def shaped():
    pytest.importorskip("miles_rollout")

    def shape(samples, **options):
        args = hook_args(LengthReward, **options)
        return LengthReward(args)(args, samples)

    return shape


def test_the_run_s_own_normalisation_gets_the_shaped_reward(shaped):
    raw, rewards = shaped(scored([(1.0, 10), (1.0, 30), (0.0, 20)]), length_weight=0.4, grpo_std_normalization=False)
    assert raw == [1.0, 1.0, 0.0]
    # 1 + 0.4 · ½, 1 − 0.4 · ½ and 0 + 0.4 · min(0, 0), less their mean ⅔.
    assert rewards == pytest.approx([1.2 - 2 / 3, 0.8 - 2 / 3, -2 / 3])


def test_without_normalisation_the_shaped_reward_is_handed_on(shaped):
    assert shaped(scored([(1.0, 10), (0.0, 30)]), rewards_normalization=False)[1] == [1.25, -0.25]


def test_lengths_are_compared_within_a_group(shaped):
    samples = [*scored([(1.0, 10), (1.0, 20)]), *scored([(1.0, 1000), (1.0, 2000)], group_index=1)]
    assert shaped(samples, rewards_normalization=False)[1] == [1.25, 0.75, 1.25, 0.75]


def test_a_group_that_is_all_right_still_trains_towards_short_answers(shaped):
    _, rewards = shaped(scored([(1.0, 10), (1.0, 20), (1.0, 30)]))
    assert rewards[0] > 0 == rewards[1] > rewards[2]


def test_what_a_tool_wrote_is_no_length(shaped):
    samples = scored([(1.0, 10), (1.0, 20)])
    samples[1].loss_mask = [1] * 10 + [0] * 10
    assert shaped(samples, rewards_normalization=False)[1] == [1.0, 1.0]


def test_samples_of_one_rollout_have_the_length_of_all_of_them(shaped):
    samples = scored([(1.0, 10), (1.0, 20), (1.0, 30)])
    samples[1].rollout_id = samples[0].rollout_id
    assert shaped(samples, rewards_normalization=False)[1] == [1.0, 1.0, 1.0]


def test_the_samples_keep_the_reward_that_was_given(shaped):
    samples = scored([(1.0, 10), (0.0, 30)])
    shaped(samples)
    assert [sample.reward for sample in samples] == [1.0, 0.0]


def test_the_least_reward_of_a_right_answer_is_an_option(shaped):
    samples = scored([(0.5, 10), (0.5, 30)])
    options = {"rewards_normalization": False, "length_right_at": 0.5}
    assert shaped(samples, rewards_normalization=False)[1] == [0.5, 0.25]
    assert shaped(samples, **options)[1] == [0.75, 0.25]


def test_a_dict_reward_is_shaped_at_its_key(shaped):
    samples = scored([({"accuracy": 1.0, "style": 0.3}, 10), ({"accuracy": 0.0, "style": 0.1}, 20)])
    raw, rewards = shaped(samples, reward_key="accuracy", rewards_normalization=False)
    assert (raw, rewards) == ([1.0, 0.0], [1.25, -0.25])
