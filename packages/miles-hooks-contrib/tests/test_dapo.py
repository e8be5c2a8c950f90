"""DAPO's filter reads accuracy and nothing else; its punishment comes after all that reads rewards."""

from types import SimpleNamespace

import pytest

from miles_api import Status
from miles_api.errors import ConfigError, MilesError, SampleError
from miles_api.testing import hook_args, make_group, make_sample
from miles_hooks_contrib.check import check
from miles_hooks_contrib.dapo import keep_mixed_groups
from miles_hooks_contrib.dapo_overlong import SoftOverlongPunishment


def decide(rewards, **options):
    args = hook_args(keep_mixed_groups, **options)
    group = make_group(len(rewards))
    for sample, reward in zip(group, rewards, strict=True):
        sample.reward = reward
    decision = keep_mixed_groups(args, group)
    return decision.keep or decision.reason


@pytest.mark.parametrize(
    ("rewards", "options", "decision"),
    [
        ([1.0, 0.0, 1.0], {}, True),
        ([1.0, 1.0, 1.0], {}, "all_right"),
        ([0.0, 0.0, 0.0], {}, "all_wrong"),
        ([1.0, -1.0], {}, True),
        ([-1.0, -1.0], {}, "all_wrong"),
        # Graded answers: what is not right is wrong, however unequal.
        ([0.2, 0.7], {}, "all_wrong"),
        ([0.2, 0.7], {"dapo_right_at": 0.5}, True),
        ([0.6, 0.7], {"dapo_right_at": 0.5}, "all_right"),
        ([1.0], {}, "all_right"),
    ],
)
def test_a_group_is_kept_if_it_has_right_and_wrong_answers(rewards, options, decision):
    assert decide(rewards, **options) == decision


def test_the_filter_looks_through_a_shaped_reward_at_the_accuracy_beside_it():
    shaped = [{"score": 0.3, "acc": 0.0}, {"score": -0.7, "acc": 0.0}]
    assert decide(shaped, reward_key="score", dapo_accuracy_key="acc") == "all_wrong"
    mixed = [{"score": 0.5, "acc": 1.0}, {"score": 0.5, "acc": 0.0}]
    assert decide(mixed, reward_key="score", dapo_accuracy_key="acc") is True


def test_without_an_accuracy_key_a_dict_reward_counts_as_the_run_counts_it():
    assert decide([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}], reward_key="a") is True
    assert decide([{"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}], reward_key="b") == "all_wrong"


@pytest.mark.parametrize("reward", [1.0, {"score": 1.0}, None])
def test_a_reward_without_the_accuracy_key_is_an_error_that_names_flag_and_sample(reward):
    with pytest.raises(SampleError, match=r"--dapo-accuracy-key acc: the reward of sample \d+ is"):
        decide([reward, reward], reward_key="score", dapo_accuracy_key="acc")


def sample_of(length, reward=1.0, **fields):
    return make_sample(tokens=list(range(3 + length)), response_length=length, reward=reward, **fields)


def punished(samples, **options):
    pytest.importorskip("miles_rollout", reason="the default reward post-processing is the rollout package's")
    chosen = {"overlong_cache": 4, "rollout_max_response_len": 10, "rewards_normalization": False} | options
    args = hook_args(SoftOverlongPunishment, **chosen)
    return SoftOverlongPunishment(args)(args, samples)


def test_the_punishment_is_the_ramp_of_the_paper():
    lengths = [0, 5, 6, 7, 8, 9, 10, 12]
    raw, rewards = punished([sample_of(length) for length in lengths])
    assert raw == [1.0] * len(lengths)
    assert rewards == pytest.approx([1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0])


def test_the_papers_own_numbers_leave_the_first_16384_tokens_alone():
    options = {"overlong_cache": 4096, "rollout_max_response_len": 20480}
    _, rewards = punished([sample_of(length, 0.0) for length in (16384, 18432, 20480)], **options)
    assert rewards == pytest.approx([0.0, -0.5, -1.0])


def test_length_and_size_of_the_punishment_are_options():
    _, rewards = punished([sample_of(5), sample_of(6)], overlong_max_len=6, overlong_cache=2, overlong_penalty=0.5)
    assert rewards == pytest.approx([0.75, 0.5])


def test_a_tools_output_is_not_the_models_length():
    talks = sample_of(10, loss_mask=[1, 1, 0, 0, 0, 0, 0, 0, 1, 1])
    assert punished([talks])[1] == [1.0]


def test_samples_keep_their_reward_whatever_is_made_of_it():
    samples = [sample_of(10, {"acc": 1.0, "form": 0.5}, status=Status.TRUNCATED), sample_of(2, {"acc": 0.0, "form": 1})]
    raw, rewards = punished(samples, reward_key="acc")
    assert (raw, rewards) == ([1.0, 0.0], [0.0, 0.0])
    assert [sample.reward for sample in samples] == [{"acc": 1.0, "form": 0.5}, {"acc": 0.0, "form": 1}]


def test_punished_rewards_are_centred_and_scaled_as_the_run_says():
    shapes = [(2, 1.0, 0), (10, 1.0, 0), (2, 0.0, 1)]
    samples = [sample_of(n, reward, group_index=g, rollout_id=i) for i, (n, reward, g) in enumerate(shapes)]
    assert punished(samples, rewards_normalization=True, grpo_std_normalization=False)[1] == [0.5, -0.5, 0.0]
    scaled = punished(samples, rewards_normalization=True)[1]
    assert scaled == pytest.approx([2**-0.5, -(2**-0.5), 0.0], abs=1e-4)


def test_a_cache_longer_than_the_longest_response_is_refused_with_both_numbers():
    args = hook_args(SoftOverlongPunishment, overlong_cache=9, rollout_max_response_len=8)
    with pytest.raises(ConfigError, match="--overlong-cache 9 is longer than the longest response, 8 tokens"):
        SoftOverlongPunishment(args)


def test_such_a_cache_is_known_before_a_run_starts():
    pytest.importorskip("miles_rollout", reason="the default reward post-processing is the rollout package's")
    options = {"overlong_cache": 9, "rollout_max_response_len": 8, "custom_reward_post_process_path": "dapo_overlong"}
    args = hook_args(SoftOverlongPunishment, **options)
    assert "--overlong-cache 9 is longer" in "".join(check(SimpleNamespace(args=args, sources={})))


@pytest.mark.parametrize("options", [{}, {"overlong_cache": 0}, {"overlong_cache": 4, "overlong_penalty": 0}])
def test_options_out_of_bounds_or_absent_are_refused_before_a_run(options):
    with pytest.raises(MilesError, match="overlong"):
        hook_args(SoftOverlongPunishment, **options)
