"""Dr.GRPO's reducer in the trainer: one gradient however a step is split, and the one of --loss-length-norm."""

from importlib import import_module

import pytest

pytest.importorskip("megatron")

import msgspec
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_api.config import HookValues
from miles_api.hook_options import HookOptions
from miles_train.options import BatchingOptions, ObjectiveOptions, ParallelOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")

LENGTH = 12.0
PACKINGS = {
    "one micro-batch a step": {},
    "some micro-batches": {"max_tokens_per_gpu": 24},
    "a micro-batch a sample": {"use_dynamic_batch_size": False, "micro_batch_size": 1},
}
BATCH = {"rollout_ids": [0, 1, 1, 2, 2, 2, 3, 3, 4, 5, 5, 6, 7, 7, 7, 8], "dead_groups": (2,)}
"""Some rollouts have several samples, and a group has no advantage."""


def config_of(hf_dir, packing, *, hook=True, ranks=1):
    config = tiny.make_config(
        hf_dir,
        HookOptions(custom_pg_loss_reducer_function_path="dr_grpo" if hook else None),
        ObjectiveOptions(skip_zero_advantage=True, loss_length_norm=None if hook else LENGTH),
        BatchingOptions(**PACKINGS[packing]),
        ParallelOptions(actor_num_gpus_per_node=ranks),
    )
    brought = {"pg_loss_reducer": HookValues(values={"dr_grpo_length": LENGTH})} if hook else {}
    return msgspec.structs.replace(config, extra=brought)


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory):
    directory = str(tmp_path_factory.mktemp("tiny-model"))
    tiny.save_model(directory)
    return directory


@pytest.fixture(scope="module")
def by_flag(hf_dir, tmp_path_factory):
    """Train with --loss-length-norm in one micro-batch a step; return weights and metrics."""
    config = config_of(hf_dir, "one micro-batch a step", hook=False)
    weights, metrics = tiny.train_once(config, tmp_path_factory.mktemp("flag"), tiny.make_batch(**BATCH))
    assert tiny.pop_packing(metrics) == 2
    return weights, metrics


@pytest.mark.parametrize(("packing", "count"), [*zip(PACKINGS, (2, None, 12), strict=True)])
def test_however_a_step_is_packed_the_hook_trains_what_the_flag_trains(hf_dir, by_flag, tmp_path, packing, count):
    weights, metrics = tiny.train_once(config_of(hf_dir, packing), tmp_path, tiny.make_batch(**BATCH))
    micro_batches = tiny.pop_packing(metrics)
    assert micro_batches == count if count else 2 < micro_batches < 12
    tiny.assert_same_weights(by_flag[0], weights)
    assert metrics["train/grad_norm"] == pytest.approx(by_flag[1]["train/grad_norm"], rel=1e-4)


def test_it_is_not_the_mean_over_each_response(hf_dir, by_flag, tmp_path):
    config = tiny.make_config(hf_dir, ObjectiveOptions(skip_zero_advantage=True))
    weights, _ = tiny.train_once(config, tmp_path, tiny.make_batch(**BATCH))
    assert tiny.differ(by_flag[0], weights)


def _train_rank(rank, hf_dir, out, ports):
    config = config_of(hf_dir, "some micro-batches", ranks=2)
    trainer = tiny.Trainer(config, **tiny.meeting(rank, ports))
    trainer.start()
    trainer.train(0, tiny.make_batch(**BATCH))
    trainer.export(out)
    trainer.stop()


def test_two_data_parallel_ranks_train_what_one_does(hf_dir, by_flag, tmp_path):
    ports = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_train_rank, args=(hf_dir, str(tmp_path), ports), nprocs=2)
    [file] = tmp_path.glob("*.safetensors")
    together = load_file(file)
    assert all(torch.isfinite(tensor).all() for tensor in together.values())
    tiny.assert_same_weights(by_flag[0], together, 2e-6)
