"""Rewards, filters, conversions and logs that break samples, groups or columns are found."""

import pytest

from miles_api import DynamicFilterOutput
from miles_api.testing import ConformanceError, make_prompt
from miles_api.testing import check_hook as check


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


def both_names(args, sample):
    return {"a": 1.0} if sample.response else {"b": 1.0}


def writes_the_label(args, sample):
    sample.label = None
    return 1.0


def cuts_the_mask(args, sample):
    sample.loss_mask = [1]
    return 1.0


async def one_for_all(args, samples):
    return 1.0


async def takes_out(args, samples):
    return [1.0 for _ in samples if samples.pop()]


def reward_alone(args, samples):
    return [sample.reward for sample in samples]


def by_group_size(args, samples):
    rewards = [sample.reward for sample in samples]
    return rewards, [reward / (len(rewards) - 1) for reward in rewards]


def sorts(args, samples):
    samples.sort(key=lambda sample: sample.reward)
    return [1.0] * len(samples), [1.0] * len(samples)


def drops_by_text(args, samples, **kwargs):
    return "keep"


def number_as_reason(args, samples, **kwargs):
    return DynamicFilterOutput(keep=False, reason=3)


def leaves_in_buffer(args, rollout_id, buffer, num_samples):
    return buffer[:num_samples]


def copies_groups(args, rollout_id, buffer, num_samples):
    return [list(buffer.pop()) for _ in range(min(num_samples, len(buffer)))]


def takes_everything(args, rollout_id, buffer, num_samples):
    taken = buffer[:]
    buffer.clear()
    return taken


def returns_what_it_keeps(args, data):
    return [group for group in data if len(group) > 1]


def removes_groups(args, data):
    del data[0]


def ignores_fan_outs(args, data):
    for group in data:
        for sample in group:
            sample.remove_sample = sample.response_length == 0


def adds_a_sample(args, all_samples, data_source):
    all_samples[0].append(make_prompt())


async def group_with_nan(args, samples):
    return [float("nan") for _ in samples]


async def group_cuts_masks(args, samples):
    samples[0].loss_mask = [1] * 99
    return [1.0 for _ in samples]


async def group_relabels(args, samples):
    samples[0].label = "8"
    return [1.0 for _ in samples]


def sums(args, samples):
    return 1.0, 1.0


def one_a_group(args, samples):
    return [sample.reward for sample in samples], sorted({sample.group_index for sample in samples})


def divides_by_zero_spread(args, samples):
    rewards = [sample.reward for sample in samples]
    spread = max(rewards) - min(rewards)
    return rewards, [reward / spread if spread else float("nan") for reward in rewards]


def centres_in_place(args, samples):
    for sample in samples:
        sample.reward -= 0.5
    rewards = [sample.reward for sample in samples]
    return rewards, rewards


def filters_in_place(args, samples, **kwargs):
    samples.pop()
    return True


def scores_again(args, samples, **kwargs):
    samples[0].reward = 0.25
    return True


def picks_a_tuple(args, rollout_id, buffer, num_samples):
    return tuple(buffer.pop() for _ in range(min(num_samples, len(buffer))))


def picks_one_twice(args, rollout_id, buffer, num_samples):
    return [buffer.pop(0)] * min(num_samples, 2)


def splits_a_group(args, rollout_id, buffer, num_samples):
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    buffer.append([make_prompt()])
    return taken


def rewrites_prompts(args, rollout_id, buffer, num_samples):
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    taken[0][0].prompt = "Again: " + taken[0][0].prompt
    return taken


def relabels(args, data):
    data[0][0].label = "8"


def marks_with_words(args, data):
    data[0][0].remove_sample = "yes"


def a_list_of_rows(args, samples):
    return [{"tokens": sample.tokens} for sample in samples]


def tokens_as_text(args, samples, *, raw_rewards, rewards):
    batch = trains_removed_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards)
    return {**batch, "tokens": [[str(token) for token in sample.tokens] for sample in samples]}


def log_probs_of_zero(args, samples, *, raw_rewards, rewards):
    batch = trains_removed_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards)
    return {**batch, "rollout_log_probs": [[float("-inf")] * sample.response_length for sample in samples]}


def weighted_masks(args, samples, *, raw_rewards, rewards):
    batch = trains_removed_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards)
    return {**batch, "loss_masks": [[2] * sample.response_length for sample in samples]}


def renumbers(args, samples, *, raw_rewards, rewards):
    for i, sample in enumerate(samples):
        sample.index = i + 100
    return trains_removed_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards)


def half_a_batch(args, samples, *, rewards):
    return {"tokens": [sample.tokens for sample in samples], "rewards": rewards}


def trains_removed_samples(args, samples, *, raw_rewards, rewards):
    return {
        "tokens": [s.tokens for s in samples], "response_lengths": [s.response_length for s in samples],
        "total_lengths": [len(s.tokens) for s in samples], "loss_masks": [[1] * s.response_length for s in samples],
        "rewards": rewards, "raw_reward": raw_rewards, "truncated": [0] * len(samples),
        "sample_indices": [s.index for s in samples], "rollout_ids": [s.rollout_id for s in samples],
        "group_indices": [s.group_index for s in samples],
    }  # fmt: skip


def infinite_reward(args, samples, *, raw_rewards, rewards):
    batch = trains_removed_samples(args, samples, raw_rewards=raw_rewards, rewards=rewards)
    return {**batch, "rewards": [float("inf") for _ in samples]}


def logs_and_says_yes(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    return "yes"


def logs_in_order(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    samples.reverse()
    return False


def logs_and_shortens(rollout_id, args, samples, rollout_extra_metrics, rollout_time):
    samples[0].response = samples[0].response[:1] + "…"


def logs_and_relabels(rollout_id, args, data, extra_metrics):
    data["math"]["samples"][0].label = None


def forgets_the_metrics(rollout_id, args, data, extra_metrics):
    data.clear()
    return True


@pytest.mark.parametrize(
    ("name", "fn", "problem", "field"),
    [
        ("reward", lambda args, sample: None, "not a finite number", "reward"),
        ("reward", lambda args, sample: {"a": "high"}, "not a finite number", "a"),
        ("reward", writes_the_label, "changed it from '7' to None", "label"),
        ("reward", cuts_the_mask, "loss_mask has 1 entries", "loss_mask"),
        ("group_reward", one_for_all, "returned a float, not a list", None),
        ("group_reward", takes_out, "returned 2 rewards for 3 samples", None),
        ("group_reward", group_with_nan, "not a finite number", "reward"),
        ("group_reward", group_cuts_masks, "has 99 entries", "loss_mask"),
        ("group_reward", group_relabels, "changed it from '7' to '8'", "label"),
        ("reward_post_process", sums, "returned float as raw_rewards", None),
        ("reward_post_process", one_a_group, "returned 1 rewards for 3 samples", None),
        ("reward_post_process", divides_by_zero_spread, "not a finite number", "rewards"),
        ("reward_post_process", centres_in_place, "changed it from 1.0 to 0.5", "reward"),
        ("dynamic_filter", filters_in_place, "reordered, added or removed", None),
        ("dynamic_filter", scores_again, "to 0.25", "reward"),
        ("buffer_filter", picks_a_tuple, "returned a tuple, not a list", None),
        ("buffer_filter", picks_one_twice, "returned a group twice", None),
        ("buffer_filter", splits_a_group, "put groups into the buffer", None),
        ("buffer_filter", rewrites_prompts, "changed it from 'What is", "prompt"),
        ("sample_filter", relabels, "changed it from '7' to '8'", "label"),
        ("sample_filter", marks_with_words, "as 'yes', not one of the truth values", "remove_sample"),
        ("convert_samples", a_list_of_rows, "returned a list, not a dict", None),
        ("convert_samples", tokens_as_text, "no list of plain numbers", "tokens"),
        ("convert_samples", log_probs_of_zero, "has NaN or infinity", "rollout_log_probs"),
        ("convert_samples", weighted_masks, "values other than 0 and 1", "loss_masks"),
        ("convert_samples", renumbers, "changed it from 0 to 100", "index"),
        ("rollout_log", logs_and_shortens, "changed it from", "response"),
        ("eval_rollout_log", logs_and_relabels, "changed it from '7' to None", "label"),
        ("reward_post_process", reward_alone, "returned list, not (raw_rewards, rewards)", None),
        ("reward_post_process", by_group_size, "raised ZeroDivisionError", None),
        ("reward_post_process", sorts, "reordered", None),
        ("dynamic_filter", drops_by_text, "not a bool", None),
        ("dynamic_filter", number_as_reason, "gave 3 as reason", "reason"),
        ("buffer_filter", leaves_in_buffer, "left a group that it returned in the buffer", None),
        ("buffer_filter", copies_groups, "was not in the buffer", None),
        ("buffer_filter", takes_everything, "returned 4 groups; 2 were asked for", None),
        ("sample_filter", returns_what_it_keeps, "returned a list; what it returns is not used", None),
        ("sample_filter", removes_groups, "reordered, added or removed", None),
        ("sample_filter", ignores_fan_outs, "raised AttributeError: 'list' object", None),
        ("all_samples_process", adds_a_sample, "reordered, added or removed", None),
        ("convert_samples", half_a_batch, "has no column", None),
        ("convert_samples", trains_removed_samples, "its loss mask is not all 0", "loss_masks"),
        ("convert_samples", infinite_reward, "not a finite number", "rewards"),
        ("rollout_log", logs_and_says_yes, "returned 'yes'", None),
        ("rollout_log", logs_in_order, "reordered", None),
        ("eval_rollout_log", lambda rollout_id, args, data, extra_metrics: 1, "returned 1, not True", None),
        ("eval_rollout_log", forgets_the_metrics, "changed the evaluation's data", None),
    ],
)  # fmt: skip
def test_a_hook_that_does_what_its_stub_forbids_is_found(name, fn, problem, field):
    error = refused(name, fn)
    assert problem in str(error)
    assert error.field == field


def test_rewards_are_of_one_kind_for_all_samples():
    assert check("reward", both_names)
    error = refused("reward", lambda args, sample: 1.0 if sample.index % 2 else {"a": 1.0})
    assert "a number for some samples and a dict" in str(error)
    assert "--reward-key a is not among ['b']" in str(refused("reward", both_names, reward_key="a"))
