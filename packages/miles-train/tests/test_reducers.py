"""Reducers: the same gradient however the step is split; nothing from masked tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_train.reducers import segment_sums, sum_of_sample_mean


def reduce_all(masks, values, per_token=False):
    lengths = [len(m) for m in masks]
    return sum_of_sample_mean([n + 1 for n in lengths], lengths, masks, per_token)(torch.cat(values))


def test_the_default_is_the_sum_of_the_samples_masked_means():
    masks = [torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0])]
    values = [torch.tensor([1.0, 3.0, 100.0]), torch.tensor([5.0])]
    assert reduce_all(masks, values).item() == 2.0 + 5.0
    assert reduce_all(masks, values, per_token=True).item() == 9.0


@pytest.mark.parametrize("per_token", [False, True])
def test_masked_and_empty_samples_add_nothing_even_where_their_values_are_not_numbers(per_token):
    masks = [torch.zeros(2), torch.zeros(0), torch.tensor([1.0, 0.0])]
    values = [torch.tensor([float("nan"), float("inf")]), torch.zeros(0), torch.tensor([2.0, float("nan")])]
    values = [v.requires_grad_() for v in values]
    total = reduce_all(masks, values, per_token)
    total.backward()
    assert total.item() == 2.0
    assert [v.grad.tolist() for v in values] == [[0.0, 0.0], [], [1.0, 0.0]]


def test_segment_sums_count_empty_samples_as_zero():
    assert segment_sums(torch.tensor([1.0, 2.0, 4.0]), [0, 2, 0, 1]).tolist() == [0.0, 3.0, 0.0, 4.0]


@st.composite
def splits(draw):
    masks = draw(st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=10))
    places = draw(st.lists(st.integers(0, 3), min_size=len(masks), max_size=len(masks)))
    return [torch.tensor(m, dtype=torch.float32) for m in masks], places


@settings(deadline=None)
@given(splits(), st.booleans())
def test_the_gradient_does_not_depend_on_how_a_step_is_split_into_micro_batches(split, per_token):
    masks, places = split
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(len(m), generator=generator).requires_grad_() for m in masks]
    parts = [v.detach().clone().requires_grad_() for v in whole]
    reduce_all(masks, [v**2 for v in whole], per_token).backward()
    for place in sorted(set(places)):
        mine = [i for i, p in enumerate(places) if p == place]
        reduce_all([masks[i] for i in mine], [parts[i] ** 2 for i in mine], per_token).backward()
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-6)
