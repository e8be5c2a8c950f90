"""Hooks on two ranks: split over tensors, stages or samples, training is what it is on one."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_api.record import read_dump
from miles_train.columns import shard_columns
from miles_train.options import BatchingOptions, ObjectiveOptions, ParallelOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")

LAYOUTS = {
    "tp": ParallelOptions(actor_num_gpus_per_node=2, tensor_model_parallel_size=2),
    "pp": ParallelOptions(actor_num_gpus_per_node=2, pipeline_model_parallel_size=2),
    "dp": ParallelOptions(actor_num_gpus_per_node=2),
}
COLUMNS = {"advantage": "advantage_from_log_probs", "rollout_data_postprocess": "mask_first_token"}
MOMENTS = {
    "megatron_init": "note_init",
    "model_provider": "FrozenEmbedding",
    "before_log_prob": "note_log_prob",
    "before_train_step": "note_step",
    "post_save": "note_save",
}
CASES = {
    "loss": (COLUMNS | MOMENTS | {"loss": "ppo_loss"}, {}, {"loss_type": "custom_loss"}),
    "policy": (
        COLUMNS | {"importance_weights": "drop_likely_tokens", "pg_loss_reducer": "plain_reducer"},
        {"use_tis": True},
        {},
    ),
    # Earlier stages can tell neither which samples pull nor how many tokens are unmasked.
    "skip": (COLUMNS | {"pg_loss_reducer": "plain_reducer"}, {"skip_zero_advantage": True}, {}),
    # Groups are spread over the ranks, and advantages are whitened over all of them once masks are final.
    "whiten": (
        {"rollout_data_postprocess": "mask_first_token"},
        {"advantage_estimator": "reinforce_plus_plus_baseline", "policy_loss_type": "cispo"},
        {},
    ),
    # Samples of one rollout lie on both ranks, and hooks change their masks there and drop columns.
    "siblings": (
        {"rollout_data_postprocess": ["mask_first_token", "forget_the_unknown"]},
        {"calculate_per_token_loss": False, "skip_zero_advantage": True},
        {},
    ),
    # Without a hook every stage has the advantages, and must find the same samples to run.
    "discount": ({}, {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "skip_zero_advantage": True}, {}),
}
SKIPPED = {"skip": 7, "siblings": 8}
PAIRS = [(layout, case) for layout in LAYOUTS for case in CASES]


def config_of(hf_dir, case, parallel, out, tokens=8192):
    functions, objective, run = CASES[case]
    return tiny.make_config(
        hf_dir,
        parallel,
        tiny.hooked(**functions),
        ObjectiveOptions(**{"calculate_per_token_loss": True} | objective),
        BatchingOptions(max_tokens_per_gpu=tokens),
        save_debug_train_data=f"{out}/train.miles",
        **run,
    )


def batch_of(case):
    if case != "siblings":
        return tiny.make_batch()
    # Rollouts of 1, 2 and 3 samples; of some, only some samples have an advantage.
    batch = tiny.make_batch(rollout_ids=[0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 7, 8], dead_groups=(2,))
    batch["rewards"][4] = 0.0
    return batch


def train(trainer, case, out):
    metrics = trainer.train(0, batch_of(case))
    trainer.saved(0, "checkpoint", None)
    trainer.export(str(out))
    return metrics.metrics, tiny.stats_of(trainer)


def run_rank(rank, hf_dir, out, ports):
    for layout, case in PAIRS:
        directory = f"{out}/{layout}-{case}"
        trainer = tiny.Trainer(config_of(hf_dir, case, LAYOUTS[layout], directory, 40), **tiny.meeting(rank, ports))
        trainer.start()
        torch.save(train(trainer, case, directory), f"{out}/{layout}-{case}-{rank}.pt")
        trainer.stop()


@pytest.fixture(scope="module")
def outcomes(hf_dir, tmp_path_factory):
    """Train the same rollout on one rank and in every layout; starting processes costs most, so two of them do all."""
    out = tmp_path_factory.mktemp("layouts")
    for case in CASES:
        with tiny.Started(config_of(hf_dir, case, ParallelOptions(), out / case)) as trainer:
            torch.save(train(trainer, case, out / case), out / f"{case}.pt")
    mp.spawn(run_rank, args=(hf_dir, str(out), mp.get_context("spawn").SimpleQueue()), nprocs=2)
    return out


def weights(directory):
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


@pytest.mark.parametrize(("layout", "case"), PAIRS)
def test_two_ranks_with_hooks_train_as_one_does(outcomes, layout, case):
    expected, _ = torch.load(outcomes / f"{case}.pt")
    (first, _), (second, _) = (torch.load(outcomes / f"{layout}-{case}-{rank}.pt") for rank in range(2))
    assert first == second
    assert first["train/samples_skipped"] == expected["train/samples_skipped"] == SKIPPED.get(case, 0)
    tiny.pop_packing(first)
    tiny.pop_packing(expected)
    assert first == pytest.approx(expected, abs=1e-5)
    tiny.assert_same_weights(weights(outcomes / case), weights(outcomes / f"{layout}-{case}"), 2e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_rank_calls_the_hooks_that_belong_to_it(outcomes, layout):
    (_, first), (_, second) = (torch.load(outcomes / f"{layout}-loss-{rank}.pt") for rank in range(2))
    everywhere = ("megatron_init", "model_provider", "before_log_prob", "before_train_step")
    assert [first[name][0] for name in everywhere] == [second[name][0] for name in everywhere] == [1, 1, 1, 2]
    for name in ("advantage", "rollout_data_postprocess", "loss"):
        assert (first[name][0] > 0) is (layout != "pp")
        assert second[name][0] > 0
    assert (first["post_save"][0], second["post_save"][0]) == (1, 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_records_what_the_last_stage_trains_on(outcomes, layout):
    [record] = read_dump(outcomes / f"{layout}-skip" / "train.miles")
    [alone] = read_dump(outcomes / "skip" / "train.miles")
    rows = {index: row for row, index in enumerate(alone.columns["sample_indices"])}
    shards = shard_columns(tiny.make_batch(), data_parallel_size=2 if layout == "dp" else 1, num_steps=2)
    assert record.columns["sample_indices"] == [100 + i for step in shards[0] for i in step]
    for row, index in enumerate(record.columns["sample_indices"]):
        assert record.columns["loss_masks"][row] == alone.columns["loss_masks"][rows[index]]
        assert record.columns["advantages"][row] == pytest.approx(alone.columns["advantages"][rows[index]], abs=1e-5)
