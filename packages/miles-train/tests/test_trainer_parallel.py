"""Two ranks, split over samples, tensors or pipeline stages, learn what one rank learns; with a critic too."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_train.options import BatchingOptions, ModelsOptions, ObjectiveOptions, ParallelOptions
from miles_train.trainer import Trainer

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, Started = tiny.make_batch, tiny.make_config, tiny.Started


LAYOUTS = {
    "dp2": ParallelOptions(actor_num_gpus_per_node=2),
    "tp2": ParallelOptions(actor_num_gpus_per_node=2, tensor_model_parallel_size=2, sequence_parallel=True),
    "tp2-whole": ParallelOptions(actor_num_gpus_per_node=2, tensor_model_parallel_size=2),
    "pp2": ParallelOptions(actor_num_gpus_per_node=2, pipeline_model_parallel_size=2),
}


OBJECTIVES = {
    "grpo": ObjectiveOptions(skip_zero_advantage=True),
    # Values, reference and old log-probs are needed before advantages, which only the last stage then has.
    "ppo": ObjectiveOptions(
        advantage_estimator="ppo", gamma=0.95, lambd=0.9, kl_coef=0.1, use_kl_loss=True, skip_zero_advantage=True
    ),
}
PACKING = {f"train/{name}" for name in ("micro_batches", "micro_batch_fill", "padding_share", "dp_imbalance")}
"""What depends on how samples are spread and packed, and may."""
CASES = [(layout, objective) for layout in LAYOUTS for objective in OBJECTIVES]
CASES.remove(("tp2-whole", "grpo"))


def _layout_config(hf_dir, objective, ref_dir, *options, **run):
    models = ModelsOptions(ref_load=ref_dir, critic_lr=1e-2) if objective == "ppo" else ModelsOptions()
    return make_config(hf_dir, OBJECTIVES[objective], models, *options, **run)


def _train_thrice(trainer, batch, out, rank=0):
    """Return the metrics of two rollouts, and of a third after export and checkpoint; the gaps lie beside `out`."""
    reports = [trainer.train(i, batch) for i in (0, 1)]
    rows = [report.metrics for report in reports]
    torch.save(reports[0].token_gaps, f"{out}-gaps-{rank}.pt")
    trainer.export(str(out))
    trainer.save(1, f"{out}-checkpoint")
    return [*rows, trainer.train(2, batch).metrics]


def _learned(metrics):
    return {name: value for name, value in metrics.items() if name not in PACKING}


def _layout_rank(rank, dirs, out, ports, batch):
    for layout, objective in CASES:
        config = _layout_config(dirs[0], objective, dirs[1], LAYOUTS[layout], BatchingOptions(max_tokens_per_gpu=40))
        trainer = Trainer(config, **tiny.meeting(rank, ports))
        trainer.start()
        rows = _train_thrice(trainer, batch, f"{out}/{layout}-{objective}", rank)
        trainer.stop()
        torch.save(rows, f"{out}/{layout}-{objective}-{rank}.pt")


@pytest.fixture(scope="module")
def layouts(hf_dir, tmp_path_factory):
    """Train the same rollouts on one rank and on two ranks in every layout; return the directory of the results."""
    directory = tmp_path_factory.mktemp("layouts")
    tiny.save_model(directory / "reference", seed=1)
    dirs = (hf_dir, str(directory / "reference"))
    batch = make_batch(dead_groups=(1,), engines=[["a:1"], ["b:2"], ["a:1"], ["a:1"]] * 4)
    for objective in OBJECTIVES:
        with Started(_layout_config(hf_dir, objective, dirs[1])) as trainer:
            torch.save(_train_thrice(trainer, batch, directory / objective), directory / f"{objective}.pt")
    ports = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_layout_rank, args=(dirs, str(directory), ports, batch), nprocs=2)
    return directory


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_ranks_together_tell_the_token_gaps_that_one_rank_tells(layouts, layout, objective):
    """Each token once, whichever ranks have it."""
    found, same = (torch.load(layouts / f"{layout}-{objective}-gaps-{rank}.pt") for rank in range(2))
    assert found == same
    expected = torch.load(layouts / f"{objective}-gaps-0.pt")
    for line in (found, expected):
        line["sources"].sort(key=lambda source: source["engine"])
    for source, one in zip(found["sources"], expected["sources"], strict=True):
        sums = {name: (source.pop(name), one.pop(name)) for name in ("gap", "log_ratio", "largest")}
        bins = zip(source.pop("bins"), one.pop("bins"), strict=True)
        # Another order of sums may move a gap over the border of its bin.
        assert sum(abs(a - b) for a, b in bins) <= 2
        assert source == one
        assert all(a == pytest.approx(b, rel=1e-4, abs=1e-4) for a, b in sums.values())
    assert [token["gap"] for token in found["worst"]] == pytest.approx([t["gap"] for t in expected["worst"]], abs=1e-4)


@pytest.mark.parametrize(("layout", "objective"), CASES)
def test_data_tensor_and_pipeline_parallel_trainers_agree_with_one_rank(layouts, layout, objective):
    first, second = (torch.load(layouts / f"{layout}-{objective}-{rank}.pt") for rank in range(2))
    assert first == second
    for row, expected in zip(first, torch.load(layouts / f"{objective}.pt"), strict=True):
        assert _learned(row) == pytest.approx(_learned(expected), abs=2e-5)
        assert ("train/value_loss" in row) is (objective == "ppo")
        assert ("train/dp_imbalance" in row) is (layout == "dp2")
    weights, expected = (
        {key: value for file in (layouts / name).glob("*.safetensors") for key, value in load_file(file).items()}
        for name in (f"{layout}-{objective}", objective)
    )
    tiny.assert_same_weights(expected, weights, 3e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_critic_that_was_saved_in_any_layout_is_continued_on_one_rank(layouts, hf_dir, layout):
    config = _layout_config(hf_dir, "ppo", str(layouts / "reference"), load_rng=False)
    with Started(config) as trainer:
        trainer.load(1, str(layouts / f"{layout}-ppo-checkpoint"))
        row = trainer.train(2, make_batch(dead_groups=(1,))).metrics
    assert _learned(row) == pytest.approx(_learned(torch.load(layouts / "ppo.pt")[2]), abs=5e-5)
