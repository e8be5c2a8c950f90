"""Columns: what is refused, how samples reach steps and ranks, what tensors they become."""

from __future__ import annotations

from itertools import accumulate, combinations, pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_api.errors import SampleError
from miles_train.columns import select, shard_columns, split_steps, to_tensors, validate_columns
from miles_train.siblings import number_rollouts


def make_batch(lengths, response=1, group=1):
    return {
        "tokens": [list(range(n)) for n in lengths],
        "response_lengths": [response] * len(lengths),
        "loss_masks": [[1] * response for _ in lengths],
        "rewards": [0.5] * len(lengths),
        "sample_indices": [100 + i for i in range(len(lengths))],
        "group_indices": [i // group for i in range(len(lengths))],
    }


def test_columns_of_equal_length_pass_and_unknown_ones_pass_through():
    batch = make_batch([3, 4]) | {"my_column": ["a", "b"], "rollout_log_probs": None, "metadata": [None, None]}
    present = validate_columns(batch)
    assert present["my_column"] == ["a", "b"]
    assert "rollout_log_probs" not in present
    assert "metadata" not in present


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0]}, r"'rewards' has 1 entries for 3 samples"),
        (
            {"rollout_log_probs": [[-1.0], None, [-1.0]]},
            r"'rollout_log_probs' is missing for 1 of 3 samples: sample 101",
        ),
        ({"loss_masks": [[1], [1], [1, 1]]}, r"'loss_masks' has 2 values for a response of 1 tokens \(sample 102\)"),
        (
            {"rollout_log_probs": [[], [0.0], [0.0]]},
            r"'rollout_log_probs' has 0 values for a response of 1 .*sample 100",
        ),
        ({"response_lengths": [1, 4, 1]}, r"'response_lengths': 4 of 4 tokens are the response.*sample 101"),
        ({"total_lengths": [3, 4, 6]}, r"'total_lengths' says 6 for 5 tokens \(sample 102\)"),
        ({"rewards": 1.0}, r"'rewards' is a float"),
        ({"tokens": None}, r"no column 'tokens'"),
        ({"log_probs": [[0.0]] * 3}, r"'log_probs' is computed by the trainer"),
        ({"rollout_mask_sums": [0] * 3}, r"'rollout_mask_sums' is computed by the trainer"),
    ],
)
def test_a_column_that_does_not_fit_is_refused_by_name_with_both_lengths(change, message):
    with pytest.raises(SampleError, match=message):
        validate_columns(make_batch([3, 4, 5]) | change)


def test_an_empty_batch_is_refused():
    with pytest.raises(SampleError, match="no sample"):
        validate_columns(make_batch([]))


def test_steps_are_contiguous_and_keep_groups_together():
    assert split_steps([0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3], 2) == [range(6), range(6, 12)]
    assert split_steps([0, 0, 0, 1, 1, 2, 2], 2) == [range(3), range(3, 7)]


def test_a_group_larger_than_a_step_is_cut_where_it_must_be():
    assert split_steps([7] * 6, 3) == [range(2), range(2, 4), range(4, 6)]


def test_fewer_samples_than_steps_are_refused():
    with pytest.raises(SampleError, match="2 samples cannot be split into 3"):
        split_steps([0, 1], 3)


def test_a_rollout_of_several_samples_moves_whole_where_its_group_must_be_cut():
    assert split_steps([7] * 6, 3, [0, 1, 1, 1, 2, 3]) == [range(1), range(1, 4), range(4, 6)]
    # The third rollout begins before the second has ended.
    assert split_steps([7] * 6, 2, [0, 1, 2, 1, 2, 3]) == [range(1), range(1, 6)]


def test_more_steps_than_rollouts_are_refused():
    with pytest.raises(SampleError, match="4 samples of 2 rollouts, which are never cut, cannot be split into 3"):
        split_steps([0] * 4, 3, [0, 0, 0, 1])


def test_where_no_cut_is_possible_because_samples_of_a_rollout_are_apart_the_error_says_so():
    with pytest.raises(SampleError, match="samples of a rollout must follow one another"):
        split_steps([0] * 4, 2, [0, 1, 0, 1])
    with pytest.raises(SampleError, match="cannot be split") as caught:
        split_steps([0] * 4, 3, [0, 0, 1, 1])
    assert "follow" not in str(caught.value)


class Counted(list):
    """Counts how often it is looked at."""

    looks = 0

    def __getitem__(self, position):
        self.looks += 1
        return super().__getitem__(position)


def test_cutting_into_more_steps_looks_at_each_sample_a_few_times_only():
    groups = Counted(i // 8 for i in range(4096))
    steps = split_steps(groups, 64)
    assert {len(step) for step in steps} == {64}
    assert groups.looks < 16 * len(groups)


def test_samples_of_one_rollout_reach_the_same_step_on_whatever_rank():
    batch = make_batch([3] * 8, group=8) | {"rollout_ids": [0, 0, 0, 0, 0, 1, 2, 2]}
    siblings = number_rollouts(batch)
    shards = shard_columns(batch, data_parallel_size=2, num_steps=2, rollouts=siblings.numbers)
    steps = [sorted(i for rank in shards for i in rank[step]) for step in range(2)]
    assert steps == [[0, 1, 2, 3, 4], [5, 6, 7]]


@given(
    sizes=st.lists(st.tuples(st.integers(1, 5), st.booleans()), min_size=1, max_size=20), num_steps=st.integers(1, 6)
)
def test_no_rollout_is_ever_cut_and_no_step_is_empty(sizes, num_steps):
    rollouts = [rollout for rollout, (size, _) in enumerate(sizes) for _ in range(size)]
    starts = list(accumulate(new for _, new in sizes))
    groups = [starts[rollout] for rollout in rollouts]
    if len(sizes) < num_steps:
        return
    steps = split_steps(groups, num_steps, rollouts)
    assert [i for step in steps for i in step] == list(range(len(rollouts)))
    assert len(steps) == num_steps
    assert all(steps)
    inside = [{rollouts[i] for i in step} for step in steps]
    assert sum(map(len, inside)) == len(sizes)


@given(groups=st.lists(st.integers(0, 3), min_size=1, max_size=40), num_steps=st.integers(1, 6))
def test_every_sample_is_in_exactly_one_step_and_no_step_is_empty(groups, num_steps):
    if len(groups) < num_steps:
        return
    steps = split_steps(groups, num_steps)
    assert [i for step in steps for i in step] == list(range(len(groups)))
    assert len(steps) == num_steps
    assert all(steps)


@given(
    lengths=st.lists(st.integers(2, 500), min_size=8, max_size=60), ranks=st.integers(1, 4), num_steps=st.integers(1, 2)
)
def test_every_rank_gets_samples_for_every_step_and_none_is_lost_or_doubled(lengths, ranks, num_steps):
    shards = shard_columns(make_batch(lengths), data_parallel_size=ranks, num_steps=num_steps)
    seen = [i for rank in shards for step in rank for i in step]
    assert sorted(seen) == list(range(len(lengths)))
    assert all(step == sorted(step) and step for rank in shards for step in rank)
    for step in range(num_steps):
        tokens = [sum(lengths[i] for i in rank[step]) for rank in shards]
        longest = max(lengths[i] for rank in shards for i in rank[step])
        assert max(tokens) - min(tokens) <= longest


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=12), num_steps=st.integers(1, 4), least=st.integers(1, 3))
def test_steps_are_large_enough_whenever_rollouts_allow_it(sizes, num_steps, least):
    rollouts = [rollout for rollout, size in enumerate(sizes) for _ in range(size)]
    ends = list(accumulate(sizes))
    possible = any(
        all(b - a >= least for a, b in pairwise((0, *cuts, ends[-1])))
        for cuts in combinations(ends[:-1], num_steps - 1)
    )
    if possible:
        steps = split_steps([0] * len(rollouts), num_steps, rollouts, least=least)
        assert [i for step in steps for i in step] == list(range(len(rollouts)))
        assert len(steps) == num_steps
        assert all(len(step) >= least for step in steps)
    else:
        with pytest.raises(SampleError, match="cannot be split"):
            split_steps([0] * len(rollouts), num_steps, rollouts, least=least)


def test_a_group_is_cut_rather_than_leaving_a_rank_without_a_sample():
    assert split_steps([0, 1, 1, 1, 1, 1], 2) == [range(1), range(1, 6)]
    assert split_steps([0, 1, 1, 1, 1, 1], 2, least=2) == [range(3), range(3, 6)]


def test_only_the_cut_that_no_start_of_a_group_is_near_falls_inside_one():
    assert [len(step) for step in split_steps([0] * 10 + [1] * 80 + [2] * 10, 4)] == [10, 40, 40, 10]


def test_ranks_take_samples_in_turn_where_nothing_is_balanced():
    batch = make_batch([9, 2, 2, 2, 2, 9, 9], group=7)
    shards = shard_columns(batch, data_parallel_size=3, num_steps=2, balance=False)
    assert shards == [[[0], [3, 6]], [[1], [4]], [[2], [5]]]


def test_ranks_are_balanced_by_what_samples_are_said_to_cost():
    batch = make_batch([9, 2, 2, 2])
    assert shard_columns(batch, data_parallel_size=2, num_steps=1) == [[[0]], [[1, 2, 3]]]
    assert shard_columns(batch, data_parallel_size=2, num_steps=1, costs=[1, 5, 3, 1]) == [[[1]], [[0, 2, 3]]]


def test_samples_that_will_not_run_do_not_count_where_ranks_are_balanced():
    shards = shard_columns(
        make_batch([9, 9, 8, 2, 2, 2]), data_parallel_size=2, num_steps=1, idle=[True, True, False, False, True, False]
    )
    assert shards == [[[1, 2]], [[0, 3, 4, 5]]]


@given(samples=st.lists(st.tuples(st.integers(2, 99), st.booleans()), min_size=4, max_size=20), ranks=st.integers(1, 4))
def test_every_rank_gets_a_sample_however_few_will_run(samples, ranks):
    lengths, idle = zip(*samples, strict=True)
    shards = shard_columns(make_batch(lengths), data_parallel_size=ranks, num_steps=1, idle=idle)
    assert sorted(i for [share] in shards for i in share) == list(range(len(samples)))
    assert all(share for [share] in shards)
    running = [sum(lengths[i] for i in share if not idle[i]) for [share] in shards]
    assert max(running) - min(running) <= max(lengths)


def test_a_long_sample_gets_a_rank_of_its_own_where_that_balances_tokens():
    assert shard_columns(make_batch([2, 2, 2, 2, 8]), data_parallel_size=2, num_steps=1) == [[[4]], [[0, 1, 2, 3]]]


def test_a_step_with_fewer_samples_than_ranks_is_refused():
    with pytest.raises(SampleError, match="4 samples cannot be split into 2 optimizer steps of at least 3, one"):
        shard_columns(make_batch([3, 3, 3, 3]), data_parallel_size=3, num_steps=2)


def test_tensors_have_the_promised_types_and_values():
    batch = make_batch([3, 5], response=2) | {"rollout_log_probs": [[-0.5, -1.0], [-2.0, -3.0]]}
    data = to_tensors(select(batch, [1, 0]))
    assert [t.tolist() for t in data["tokens"]] == [[0, 1, 2, 3, 4], [0, 1, 2]]
    assert data["tokens"][0].dtype == torch.int64
    assert data["loss_masks"][0].dtype == torch.float32
    assert data["rollout_log_probs"][0].tolist() == [-2.0, -3.0]
    assert data["total_lengths"] == [5, 3]
    assert data["sample_indices"] == [101, 100]
    assert data["rewards"] == [0.5, 0.5]
