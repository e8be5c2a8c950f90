"""Tokens that trainer and engine disagree on: each counted once, by engine and version, the worst with context."""

from __future__ import annotations

import math
from importlib import import_module

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_train.options import BatchingOptions, ObjectiveOptions
from miles_train.token_gap_types import BINS_PER_DECADE, LOWEST_DECADE, NUM_BINS
from miles_train.token_gaps import MOST_SOURCES, MOST_WORST, TokenGaps

tiny = import_module("packages.miles-train.tests.tiny_trainer")


def micro_batch(gaps, masks=None, first=0, **columns):
    """Return log-probs of the trainer and the columns of responses whose engine is 0.5 nats per token."""
    masks = masks or [[1] * len(own) for own in gaps]
    batch = {
        "tokens": [torch.arange(100 * i, 100 * i + 20 + len(own)) for i, own in enumerate(gaps, first)],
        "loss_masks": [torch.tensor(mask, dtype=torch.float32) for mask in masks],
        "rollout_log_probs": [torch.full((len(own),), -0.5) for own in gaps],
        "response_lengths": [len(own) for own in gaps],
        "sample_indices": list(range(first, first + len(gaps))),
        **columns,
    }
    return torch.tensor([gap - 0.5 for own in gaps for gap in own]), batch


def gaps_of(*micro_batches):
    found = TokenGaps()
    for log_probs, batch in micro_batches:
        found.add(log_probs, batch)
    return found


def bin_of(gap):
    return min(NUM_BINS - 1, max(0, math.floor((math.log10(gap) - LOWEST_DECADE) * BINS_PER_DECADE) + 1))


_TOKENS = st.lists(st.tuples(st.floats(-3, 3), st.booleans()), max_size=6)
_SAMPLES = st.tuples(st.sampled_from("abc"), st.sampled_from("01"), _TOKENS)


@settings(max_examples=80, deadline=None)
@given(st.lists(_SAMPLES, min_size=1, max_size=8), st.integers(0, 8))
def test_every_unmasked_token_is_counted_exactly_once_under_its_engine_and_version(samples, cut):
    parts = [part for part in (samples[:cut], samples[cut:]) if part]
    found = gaps_of(*(
        micro_batch(
            [[gap for gap, _ in tokens] for *_, tokens in part],
            [[int(kept) for _, kept in tokens] for *_, tokens in part],
            engines=[[engine] for engine, *_ in part],
            weight_versions=[[version] for _, version, _ in part],
        )
        for part in parts
    ))  # fmt: skip
    expected = {}
    for engine, version, tokens in samples:
        kept = [gap for gap, kept in tokens if kept]
        if kept:
            expected.setdefault((engine, version), []).extend(kept)
    counted = {key: source for key, source in found.sources.items() if source.tokens}
    assert {key: source.tokens for key, source in counted.items()} == {k: len(v) for k, v in expected.items()}
    for key, gaps in expected.items():
        assert sum(counted[key].bins) == len(gaps)
        assert counted[key].log_ratio == pytest.approx(math.fsum(gaps), abs=1e-5)
        assert counted[key].largest == pytest.approx(max(map(abs, gaps)), abs=1e-6)


@pytest.mark.parametrize("gap", [3e-9, 2e-7, 0.00099, 0.4, 7.0, 1e5])
def test_a_token_stands_in_the_bin_that_its_gap_belongs_to(gap):
    _, batch = micro_batch([[0.0]])
    batch["rollout_log_probs"] = [torch.zeros(1)]
    [source] = gaps_of((torch.tensor([-gap]), batch)).sources.values()
    assert source.bins[bin_of(gap)] == 1


def test_a_planted_mismatch_of_one_engine_shows_under_that_engine_and_nowhere_else():
    gaps = [[1e-6] * 5, [-0.3] * 5, [2e-6] * 5]
    found = gaps_of(micro_batch(gaps, engines=[["a:1"], ["b:2"], ["a:1"]], weight_versions=[["7"]] * 3))
    healthy, broken = found.sources["a:1", "7"], found.sources["b:2", "7"]
    assert (healthy.tokens, broken.tokens) == (10, 5)
    assert healthy.largest < 1e-5
    assert broken.gap / broken.tokens == pytest.approx(0.3, rel=1e-5)
    assert broken.log_ratio < 0
    assert {token.engine for token in found.worst[:5]} == {"b:2"}


def test_an_engine_whose_tokens_are_all_masked_is_no_source():
    columns = {"engines": [["a"], ["b"]], "weight_versions": [["1"], ["1"]]}
    found = gaps_of(micro_batch([[0.1] * 2, [0.2] * 2], masks=[[0, 0], [1, 0]], **columns))
    assert {key: source.tokens for key, source in found.sources.items()} == {("b", "1"): 1}
    assert found.sources["b", "1"].log_ratio == pytest.approx(0.2)


def test_the_worst_tokens_come_with_their_place_and_what_stands_around_them():
    gaps = [[0.0] * 30, [0.0, 0.0, -2.5, 0.0]]
    found = gaps_of(micro_batch(gaps, masks=[[1] * 30, [1, 1, 1, 0]]), micro_batch([[0.1] * 3], first=7))
    worst = found.worst[0]
    assert (worst.sample, worst.position, round(worst.gap, 5), worst.tokens[worst.at]) == (1, 2, 2.5, 122)
    assert worst.tokens == list(range(106, 124))
    assert (round(worst.trainer, 5), round(worst.rollout, 5)) == (-3.0, -0.5)
    assert [token.sample for token in found.worst[1:4]] == [7, 7, 7]
    assert len(found.worst) == MOST_WORST


def test_what_is_kept_does_not_grow_with_the_rollout():
    found = TokenGaps()
    for number in range(3 * MOST_SOURCES):
        found.add(*micro_batch([[0.01] * 4], first=number, engines=[[f"engine:{number}"]], weight_versions=[["1"]]))
    assert len(found.sources) == MOST_SOURCES + 1
    assert sum(source.tokens for source in found.sources.values()) == 12 * MOST_SOURCES
    assert len(found.worst) == MOST_WORST


def test_a_sample_of_several_engines_and_versions_is_told_apart_from_those_of_one():
    columns = {"engines": [["a", "b"], ["a"], []], "weight_versions": [["3", "4", "5"], ["3"], []]}
    found = gaps_of(micro_batch([[0.1], [0.1], [0.1]], **columns))
    assert list(found.sources) == [("a … b", "3 … 5"), ("a", "3"), ("", "")]


def test_nothing_is_kept_without_the_engines_log_probs_or_an_unmasked_token():
    log_probs, batch = micro_batch([[0.1]])
    del batch["rollout_log_probs"]
    assert gaps_of((log_probs, batch), micro_batch([[0.1]], masks=[[0]])).report() == {}


@pytest.mark.parametrize("reused", [False, True])
def test_a_training_report_has_the_gaps_of_every_token_that_the_old_weights_see(hf_dir, reused):
    batch = tiny.make_batch(engines=[["a:1"], ["b:2"]] * 8, weight_versions=[["5"]] * 16)
    objective = ObjectiveOptions(use_rollout_logprobs=reused)
    config = tiny.make_config(hf_dir, objective, BatchingOptions(max_tokens_per_gpu=20), num_steps_per_rollout=1)
    with tiny.Started(config) as trainer:
        line = msgspec.json.decode(msgspec.json.encode(trainer.train(0, batch).token_gaps))
    tokens = {(source["engine"], source["version"]): source["tokens"] for source in line["sources"]}
    masks = [sum(mask) for mask in batch["loss_masks"]]
    assert tokens == {("a:1", "5"): sum(masks[::2]), ("b:2", "5"): sum(masks[1::2])}
    for token in line["worst"]:
        place = batch["sample_indices"].index(token["sample"])
        sequence = batch["tokens"][place]
        assert (
            token["tokens"][token["at"]]
            == sequence[len(sequence) - batch["response_lengths"][place] + token["position"]]
        )
