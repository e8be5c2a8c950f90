"""Micro-batch packing."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from miles_train.batching import pack_micro_batches


@given(lengths=st.lists(st.integers(1, 50), max_size=40), max_tokens=st.integers(1, 60))
def test_every_sample_is_packed_once_and_only_a_lone_sample_may_exceed_the_limit(lengths, max_tokens):
    batches = pack_micro_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or sum(lengths[i] for i in batch) <= max_tokens


def test_a_sample_longer_than_the_limit_is_alone_and_others_still_share():
    assert pack_micro_batches([3, 20, 4, 3], 10) == [[1], [0, 2, 3]]


def test_short_samples_fill_the_gaps_that_long_ones_leave():
    assert pack_micro_batches([6, 6, 4, 4], 10) == [[0, 2], [1, 3]]


def test_no_samples_make_no_micro_batch():
    assert pack_micro_batches([], 10) == []
