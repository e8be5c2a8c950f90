"""What an engine says about its weights is compared, and what differs is named."""

from __future__ import annotations

import math

import pytest

from miles_api.errors import ServiceError


@pytest.mark.parametrize(("interval", "checked"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (0, [0])])
def test_the_first_push_and_then_every_nth_is_checked_on_every_engine(engines, trainer, make_sync, interval, checked):
    sync = make_sync(weight_check_interval=interval)
    assert [push for push in range(7) if sync.push(push)] == checked
    for engine in engines:
        assert len(engine.requests("/weights_checker")) == len(engine.requests("/generate")) == len(checked)
    assert trainer.scored == len(checked)


def test_a_check_reports_what_it_compared(engines, make_sync):
    engines[1].log_prob = -1.0005
    metrics = make_sync().push(1)
    assert metrics == pytest.approx({
        "sync/checked": 2, "sync/checked_tensors": 2, "sync/probe_gap_max": 5e-4, "sync/probe_gap_mean": 5e-4,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("sums", "stale", "problem"),
    [
        ({"norm": "cc"}, [], r"1 of other values: norm \(bb here, cc there\)$"),
        ({"norm": None}, [], "1 missing: norm$"),
        ({"layers.0.scale": "cc"}, [], r"1 unknown to the trainer: layers\.0\.scale$"),
        ({"norm": "cc", "embed": "dd"}, [], r"2 of other values: embed .*, norm "),
        ({}, ["layers.0.qkv"], r"1 read, but not in use: layers\.0\.qkv$"),
    ],
)
def test_tensors_that_differ_are_named_with_the_engine(engines, make_sync, sums, stale, problem):
    found = engines[1].checks[1]["checksums"]
    found |= sums
    engines[1].checks[1]["checksums"] = {name: value for name, value in found.items() if value}
    engines[1].checks[1]["stale"] = stale
    with pytest.raises(ServiceError, match=problem) as raised:
        make_sync().push(1)
    assert engines[1].endpoint.url in str(raised.value)


def test_a_tied_output_layer_may_be_listed_beside_the_embedding(engines, make_sync):
    engines[0].checks[1]["checksums"]["lm_head.weight"] = "aa"
    assert make_sync().push(1)["sync/checked_tensors"] == 2


@pytest.mark.parametrize(
    "checks",
    [
        (404, {"detail": "Not Found"}),
        (200, {"success": True, "message": "", "ranks": [{"checksums": {"model.norm.weight": "1"}}]}),
    ],
)
def test_an_engine_that_offers_no_comparable_hashes_is_checked_by_log_probs_alone(engines, make_sync, checks):
    engines[0].checks = engines[1].checks = checks
    sync = make_sync(weight_check_interval=1)
    assert sync.push(1)["sync/checked_tensors"] == 0
    engines[1].log_prob = -4.0
    with pytest.raises(ServiceError, match="computes other log-probs"):
        sync.push(2)


def sglang_says(engine, sums, **info):
    engine.checks = (200, {"success": True, "ranks": [{"checksums": sums}]})
    engine.replies = {"/server_info": (200, {"device": "cpu", "dtype": "float32"} | info)}


def test_sglangs_hashes_of_tensors_that_it_neither_fuses_nor_pads_are_compared_on_a_cpu(engines, make_sync):
    for engine in engines:
        sglang_says(engine, {"norm": "bb", "qkv_proj": "xx", "model.embed_tokens.weight": "padded"})
    assert make_sync().push(1)["sync/checked_tensors"] == 1
    sglang_says(engines[1], {"norm": "other"})
    with pytest.raises(ServiceError, match=r"1 of other values: norm \(bb here, other there\)$"):
        make_sync().push(2)


@pytest.mark.parametrize("info", [{"device": "cuda"}, {"dtype": "bfloat16"}])
def test_sglangs_hashes_of_another_kind_are_not_compared(engines, make_sync, info):
    for engine in engines:
        sglang_says(engine, {"norm": "other"}, **info)
    assert make_sync().push(1)["sync/checked_tensors"] == 0


def test_an_engine_that_fails_to_hash_stops_the_run(engines, make_sync):
    engines[0].checks = (400, {"success": False, "message": "the files are gone"})
    with pytest.raises(ServiceError, match=r"refused /weights_checker: 400 .*the files are gone"):
        make_sync().push(1)


def test_other_log_probs_are_named_with_sequence_position_and_both_values(engines, make_sync):
    engines[1].log_prob = -1.25
    with pytest.raises(ServiceError) as raised:
        make_sync().push(1)
    for part in (engines[1].endpoint.url, "sequence 0 [1, 2, 3]", "position 1", "-1.25 there, -1.0 here", "0.25 nats"):
        assert part in str(raised.value)


@pytest.mark.parametrize("log_prob", [math.nan, None, math.inf])
def test_a_log_prob_that_is_no_number_is_never_near_enough(engines, make_sync, log_prob):
    engines[0].log_prob = log_prob
    with pytest.raises(ServiceError, match="computes other log-probs"):
        make_sync(weight_check_tolerance=1e9).push(1)


def test_the_tolerance_follows_the_dtype_of_the_weights_unless_it_is_given(engines, trainer, make_sync):
    engines[0].log_prob = -1.002
    with pytest.raises(ServiceError, match=r"--weight-check-tolerance 0\.001\)"):
        make_sync().push(1)
    make_sync(weight_check_tolerance=0.003).push(1)
    trainer.dtype = "bfloat16"
    make_sync().push(1)


@pytest.mark.parametrize("tokens", [[[1, 2, 4], [4, 5]], [[1, 2], [4, 5]], [[1, 2, 3]]])
def test_log_probs_of_other_tokens_are_no_answer(engines, make_sync, tokens):
    engines[0].tokens = tokens
    with pytest.raises(ServiceError, match=r"gave no (log-probs for the tokens|answer for each)"):
        make_sync().push(1)
