"""What samples cost, and the metrics of what is wasted on them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miles_train.batching import spread
from miles_train.megatron.hf_config import HFConfig, read_hf_config
from miles_train.objective import Step
from miles_train.options import BatchingOptions
from miles_train.work import WorkMeter, imbalance, sample_flops

tiny = import_module("packages.miles-train.tests.tiny_trainer")

SIZES = {
    "architecture": "Qwen3ForCausalLM", "num_layers": 3, "hidden_size": 8, "ffn_hidden_size": 20, "num_heads": 4,
    "num_kv_heads": 2, "head_dim": 4, "vocab_size": 50, "max_positions": 99, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "tied": True, "qk_norm": True, "qkv_bias": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    tiny.save_model(directory)
    return str(directory)


def columns(lengths, responses):
    return {"tokens": [torch.zeros(n) for n in lengths], "response_lengths": responses}


def test_a_sample_costs_its_tokens(hf_dir):
    meter = WorkMeter(tiny.make_config(hf_dir))
    assert meter.costs(columns([7, 3], [2, 1])) == [7, 3]


def test_operations_are_those_of_the_matrix_products(hf_dir):
    meter = WorkMeter(tiny.make_config(hf_dir, BatchingOptions(balance_by_flops=True)))
    [short, long, answer] = meter.costs(columns([10, 20, 20], [1, 1, 2]))
    # The models' weights beside norms and embedding, each a multiplication and an addition a token.
    weights = 2 * (32 * (4 + 2 + 2) * 8 + 4 * 8 * 32 + 3 * 32 * 48)
    pairs = 2 * (4 * 8) * 2 * 2 / 2
    assert short == 2 * weights * 10 + 2 * 32 * tiny.VOCAB + pairs * 100
    assert long == 2 * weights * 20 + 2 * 32 * tiny.VOCAB + pairs * 400
    assert answer - long == 2 * 32 * tiny.VOCAB
    assert read_hf_config(hf_dir).num_layers == 2


@given(length=st.integers(2, 10_000), times=st.integers(2, 8))
def test_one_long_sample_costs_more_than_as_many_tokens_in_short_ones(length, times):
    short, long = sample_flops([length, length * times], [1, times], HFConfig(**SIZES))
    assert long > short * times


def test_balancing_operations_gives_long_samples_fewer_companions():
    lengths, model = [2000, *[500] * 8], HFConfig(**SIZES)
    assert [len(share) for share in spread(lengths, 2)] == [3, 6]
    assert [len(share) for share in spread(sample_flops(lengths, [100] * 9, model), 2)] == [1, 8]


def test_imbalance_is_the_busiest_rank_over_the_mean_less_one():
    assert imbalance([[3, 3, 3]]) == 0
    assert imbalance([[6, 2, 1]]) == 1
    # The second step trains nothing.
    assert imbalance([[6, 2, 1], [0, 0, 0], [3, 3, 3]]) == 0.5


def test_a_rank_counts_what_runs_and_learns_what_runs_elsewhere(hf_dir):
    meter = WorkMeter(tiny.make_config(hf_dir))
    steps = [Step(0, [0, 1], 1.0, 1.0), Step(1, [], 1.0, 1.0), Step(2, [2], 1.0, 1.0)]
    told = []

    def sum_over_ranks(rows):
        told.extend(rows)
        return [[30.0, 10.0, 20.0], [0.0, 0.0, 0.0], [8.0, 4.0, 0.0]]

    data = columns([4, 6, 4, 50], [1, 1, 1, 1])
    assert meter.compare_ranks(data, steps, 1, 3, sum_over_ranks) == {"dp_imbalance": pytest.approx((0.5 + 1.0) / 2)}
    assert told == [[0.0, 10.0, 0.0], [0.0, 0.0, 0.0], [0.0, 4.0, 0.0]]
    assert meter.compare_ranks(data, steps, 0, 1, sum_over_ranks) == {}


def test_padding_and_fill_come_from_slots_tokens_and_budget(hf_dir):
    numbers = {"tokens": 300.0, "micro_batches": 4.0, "attention_slots": 400.0, "loss": 1.0}
    packed = WorkMeter(tiny.make_config(hf_dir, BatchingOptions(max_tokens_per_gpu=100)))
    assert packed.finish(numbers) == {
        "tokens": 300.0, "micro_batches": 4.0, "loss": 1.0, "padding_share": 0.25, "micro_batch_fill": 0.75,
    }  # fmt: skip
    fixed = WorkMeter(tiny.make_config(hf_dir, BatchingOptions(use_dynamic_batch_size=False)))
    assert fixed.finish(numbers).keys() == {"tokens", "micro_batches", "loss", "padding_share"}
    assert packed.finish({"loss": 0.0}) == {"loss": 0.0}


def test_a_trainer_reports_its_fill_and_the_padding_of_its_attention(hf_dir):
    batch = tiny.make_batch(groups=2, size=2)
    tokens = sum(map(len, batch["tokens"]))
    options = BatchingOptions(max_tokens_per_gpu=1000)
    with tiny.Started(tiny.make_config(hf_dir, options, num_steps_per_rollout=1)) as trainer:
        metrics = trainer.train(0, batch).metrics
    assert metrics["train/micro_batch_fill"] == pytest.approx(tokens / 1000)
    # Lengths so close are one bucket.
    assert metrics["train/padding_share"] == pytest.approx(1 - tokens / (4 * max(map(len, batch["tokens"]))))
    assert not {"train/attention_slots", "train/dp_imbalance"} & set(metrics)
