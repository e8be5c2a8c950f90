"""Spreading samples over ranks and packing them into micro-batches."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.config import RunConfig
from miles_train import batching
from miles_train.batching import check_batching, make_micro_batches, pack_micro_batches, spread
from miles_train.options import BatchingOptions

COSTS = st.lists(st.integers(0, 2) | st.integers(0, 500), max_size=40)


def heaviest(costs, shares):
    return max(sum(costs[i] for i in share) for share in shares)


@given(costs=COSTS, parts=st.integers(1, 9))
def test_everything_is_in_one_part_and_none_is_empty_where_there_is_enough(costs, parts):
    shares = spread(costs, parts)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    assert len(shares) == parts
    assert all(share == sorted(share) for share in shares)
    assert sum(map(bool, shares)) == min(parts, len(costs))


def test_samples_that_cost_nothing_are_shared_out_too():
    assert [len(share) for share in spread([0] * 5, 3)] == [2, 2, 1]


@given(costs=COSTS.filter(any), parts=st.integers(1, 9))
def test_no_part_exceeds_the_mean_by_more_than_a_sample(costs, parts):
    assert heaviest(costs, spread(costs, parts)) <= sum(costs) / parts + max(costs) * (1 - 1 / parts) + 1e-9


@settings(deadline=None)  # the best there is takes a look at all there are
@given(costs=st.lists(st.integers(1, 30), min_size=1, max_size=6), parts=st.integers(1, 3))
def test_the_heaviest_part_is_within_a_third_of_the_best_there_is(costs, parts):
    best = min(
        heaviest(costs, [[i for i, at in enumerate(places) if at == part] for part in range(parts)])
        for places in product(range(parts), repeat=len(costs))
    )
    assert heaviest(costs, spread(costs, parts)) <= best * (4 / 3 - 1 / (3 * parts)) + 1e-9


@given(lengths=st.lists(st.integers(1, 50), max_size=40), max_tokens=st.integers(1, 60))
def test_every_sample_is_packed_once_and_only_a_lone_sample_may_exceed_the_limit(lengths, max_tokens):
    batches = pack_micro_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(batch == sorted(batch) and batch for batch in batches)
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens
    tokens = [sum(lengths[i] for i in batch) for batch in batches]
    assert tokens == sorted(tokens, reverse=True)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=40), max_tokens=st.integers(50, 120))
def test_no_more_micro_batches_than_half_full_ones_would_be(lengths, max_tokens):
    batches = pack_micro_batches(lengths, max_tokens)
    assert len(batches) <= max(1, 2 * sum(lengths) // max_tokens + 1)


def test_a_sample_longer_than_the_limit_is_alone_and_others_still_share():
    assert pack_micro_batches([3, 20, 4, 3], 10) == [[1], [0, 2, 3]]


def test_long_samples_that_hardly_share_are_spread_over_one_number_of_micro_batches_only(monkeypatch):
    tried = []
    monkeypatch.setattr(batching, "spread", lambda lengths, parts: tried.append(parts) or spread(lengths, parts))
    assert len(pack_micro_batches([6] * 50 + [3] * 50, 10)) == 50
    assert tried == [50]


def test_short_samples_fill_the_gaps_that_long_ones_leave():
    assert pack_micro_batches([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]
    # Spread evenly these would need a third micro-batch.
    assert pack_micro_batches([5, 5, 4, 3, 3], 10) == [[0, 1], [2, 3, 4]]


def test_the_last_micro_batch_is_not_left_nearly_empty():
    tokens = [4] * 11
    assert [len(batch) for batch in pack_micro_batches(tokens, 40)] == [6, 5]


def test_no_samples_make_no_micro_batch():
    assert pack_micro_batches([], 10) == []


@given(lengths=st.lists(st.integers(1, 50), max_size=40), size=st.integers(1, 9) | st.none())
def test_a_fixed_number_of_samples_makes_a_micro_batch_whatever_their_lengths(lengths, size):
    options = BatchingOptions(use_dynamic_batch_size=False, micro_batch_size=size, max_tokens_per_gpu=1)
    batches = make_micro_batches(lengths, options)
    assert [i for batch in batches for i in batch] == list(range(len(lengths)))
    assert all(len(batch) == (size or 1) for batch in batches[:-1])
    assert all(0 < len(batch) <= (size or 1) for batch in batches[-1:])


def test_micro_batches_are_packed_unless_told_otherwise():
    assert make_micro_batches([6, 6, 4, 4], BatchingOptions(max_tokens_per_gpu=10)) == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch_size": 4}, "--micro-batch-size 4 needs --no-use-dynamic-batch-size"),
        ({"balance_by_flops": True, "balance_data": False}, "--no-balance-data not to: drop one"),
    ],
)
def test_what_would_not_be_done_is_refused(options, message):
    config = RunConfig({"batching": BatchingOptions(**options)}, {})
    [problem] = check_batching(config)
    assert message in problem


@pytest.mark.parametrize(
    "options", [{}, {"max_tokens_per_gpu": 9}, {"use_dynamic_batch_size": False, "micro_batch_size": 2}]
)
def test_what_belongs_together_passes(options):
    config = RunConfig({"batching": BatchingOptions(**options)}, {})
    assert list(check_batching(config)) == []
