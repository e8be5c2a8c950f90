import math

import pytest

from miles_api import Sample
from miles_api.errors import ConfigError, SampleError
from miles_rollout.convert import convert_samples
from miles_rollout.filters import check_no_aborted, check_reward_nonzero_std
from miles_rollout.normalize import normalize_rewards
from miles_rollout.rewards import grade
from miles_rollout.rewards.math import final_answer


def scored(*groups):
    return [Sample(group_index=g, index=i, reward=r) for g, rewards in enumerate(groups) for i, r in enumerate(rewards)]


def test_ragged_groups_are_each_centred_and_scaled_on_their_own(args_of):
    raw, normalised = normalize_rewards(args_of(), scored([0.0, 1.0], [1.0, 2.0, 6.0], [4.0]))
    assert raw == [0.0, 1.0, 1.0, 2.0, 6.0, 4.0]
    assert normalised[:2] == pytest.approx([-(0.5**0.5), 0.5**0.5], abs=1e-5)
    assert sum(normalised[2:5]) == pytest.approx(0, abs=1e-9)
    assert math.sqrt(sum(x * x for x in normalised[2:5]) / 2) == pytest.approx(1, abs=1e-5)
    assert normalised[5] == 0.0


def test_a_group_of_equal_rewards_gets_exactly_zero(args_of):
    _, normalised = normalize_rewards(args_of(), scored([0.1] * 3, [0.7] * 8))
    assert normalised == [0.0] * 11


def test_groups_are_told_by_index_and_not_by_position(args_of):
    samples = scored([0.0, 1.0], [5.0, 5.0])
    samples[1], samples[2] = samples[2], samples[1]
    _, normalised = normalize_rewards(args_of(grpo_std_normalization=False), samples)
    assert normalised == [-0.5, 0.0, 0.5, 0.0]


def fanned_out(*groups):
    """Return samples of groups of rollouts of siblings, each given by its reward."""
    return [
        Sample(group_index=g, index=0, rollout_id=10 * g + i, reward=reward)
        for g, rollouts in enumerate(groups)
        for i, rewards in enumerate(rollouts)
        for reward in rewards
    ]


@pytest.mark.parametrize("std", [False, True])
def test_a_rollout_counts_once_in_its_group_however_many_samples_it_has(args_of, std):
    args = args_of(grpo_std_normalization=std)
    _, alone = normalize_rewards(args, fanned_out([[1.0], [0.0], [0.5]], [[2.0], [3.0]]))
    _, several = normalize_rewards(args, fanned_out([[1.0] * 5, [0.0], [0.5] * 2], [[2.0] * 3, [3.0]]))
    a, b, c, d, e = alone
    assert several == [a] * 5 + [b] + [c] * 2 + [d] * 3 + [e]


def test_siblings_with_rewards_of_their_own_count_with_their_mean_and_keep_the_difference(args_of):
    _, normalised = normalize_rewards(args_of(), fanned_out([[0.0, 1.0], [1.5], [2.5]]))
    # Rollouts have 0.5, 1.5 and 2.5: mean 1.5, deviation 1.
    assert normalised == pytest.approx([-1.5, -0.5, 0.0, 1.0], abs=1e-5)


def test_a_group_of_one_rollout_has_nothing_to_compare_with(args_of):
    for std in (False, True):
        args = args_of(grpo_std_normalization=std)
        assert normalize_rewards(args, fanned_out([[0.0, 1.0]], [[3.0]]))[1] == [0.0] * 3


def test_rollouts_that_are_equal_but_for_rounding_are_not_divided_by_it(args_of):
    samples = fanned_out([[0.1, 0.2, 0.3], [0.2], [0.2, 0.2, 0.2]])
    assert normalize_rewards(args_of(), samples)[1] == [0.0] * 7
    _, centred = normalize_rewards(args_of(grpo_std_normalization=False), samples)
    assert centred == pytest.approx([-0.1, 0, 0.1, 0, 0, 0, 0], abs=1e-9)


def test_rollout_ids_without_siblings_change_no_bit(args_of):
    plain = scored([0.1, 0.7, 0.35], [1e-7, 2e-7], [0.3, 0.3])
    numbered = [Sample(group_index=s.group_index, rollout_id=i, reward=s.reward) for i, s in enumerate(plain)]
    assert normalize_rewards(args_of(), plain) == normalize_rewards(args_of(), numbered)


def test_normalisation_can_be_turned_off(args_of):
    assert normalize_rewards(args_of(rewards_normalization=False), scored([0.0, 3.0]))[1] == [0.0, 3.0]


def finished(index, **fields):
    given = {"tokens": [1, 2, 3], "response_length": 2, "reward": 1.0, "rollout_log_probs": [-1.0, -2.0], **fields}
    return Sample(group_index=0, index=index, rollout_id=index, **given)


def convert(args, samples):
    return convert_samples(args, samples, raw_rewards=[1.0] * len(samples), rewards=[0.0] * len(samples))


def test_columns_hold_one_entry_a_sample(args_of):
    batch = convert(args_of(), [finished(0), finished(1, loss_mask=[0, 1], status=Sample.Status.TRUNCATED)])
    assert batch["loss_masks"] == [[1, 1], [0, 1]]
    assert batch["truncated"] == [0, 1]
    assert batch["total_lengths"] == [3, 3]
    assert "teacher_log_probs" not in batch


def test_a_removed_sample_keeps_its_place_outside_the_loss(args_of):
    batch = convert(args_of(), [finished(0, remove_sample=True), finished(1)])
    assert batch["loss_masks"] == [[0, 0], [1, 1]]


def test_a_column_that_only_some_samples_have_is_an_error(args_of):
    with pytest.raises(SampleError, match=r"rollout_log_probs: 1 lack it, such as \[1\]"):
        convert(args_of(), [finished(0), finished(1, rollout_log_probs=None)])


def test_a_field_that_would_be_ignored_is_an_error(args_of):
    with pytest.raises(SampleError, match="multimodal"):
        convert(args_of(), [finished(0, multimodal_inputs={"image": "x"})])


def test_stock_filters_drop_equal_and_aborted_groups(args_of):
    args = args_of()
    assert check_reward_nonzero_std(args, scored([0.0, 1.0])).keep
    assert check_reward_nonzero_std(args, scored([1.0, 1.0])).reason == "zero_std_1.0"
    assert check_no_aborted(args, [finished(0)]).keep
    assert check_no_aborted(args, [finished(0, status=Sample.Status.ABORTED)]).reason == "aborted"


@pytest.mark.parametrize(
    ("response", "label", "score"),
    [
        ("the answer is 42", 42, 1.0),
        ("the answer is 42", "41", 0.0),
        ("we get \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("so \\boxed{\\dfrac{2}{4}}.", "1/2", 1.0),
        ("1,234", "1234", 1.0),
        ("\\boxed{x^{2}+1} or 7", "x^{2}+1", 1.0),
        ("\\boxed{1e30000000}", "3", 0.0),
        ("9" * 5000, "3", 0.0),
        ("A", "A", 1.0),
        ("", "3", 0.0),
        ("1/0", "3", 0.0),
        ("\\boxed{unclosed 5", "5", 1.0),
        ("anything", None, 0.0),
    ],
)
def test_math_compares_text_and_rational_numbers(response, label, score):
    assert grade("math", response, label) == score


def test_boxed_grades_only_what_is_in_the_box():
    assert grade("boxed_math", "\\boxed{4} 5", 4) == 1.0
    assert grade("boxed_math", "4", 4) == 0.0
    assert final_answer("a \\boxed{1} b \\boxed{{2}} 3") == "{2}"


def test_f1_is_over_normalised_words_and_the_best_of_the_answers():
    assert grade("f1", "The cat, sat!", "cat sat") == 1.0
    assert grade("f1", "a dog", ["cat", "big dog"]) == pytest.approx(2 / 3)
    assert grade("f1", "", "cat") == 0.0


def test_an_unknown_kind_is_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'math'"):
        grade("mth", "1", "1")
