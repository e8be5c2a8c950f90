"""How far the trainer is from the engine: estimates against their definitions, in parts, and at the ends of fp64."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from miles_train.metrics import Metrics
from miles_train.mismatch import finish_mismatch, mismatch
from miles_train.options import BatchingOptions, ObjectiveOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, train_once = tiny.make_batch, tiny.make_config, tiny.train_once


def measured(trainer, engine, masks=None, *, parts=((0, None),)):
    """Return the metrics of samples, added up over the given parts of them."""
    masks = masks or [[1] * len(sample) for sample in trainer]
    metrics = Metrics()
    for start, end in parts:
        part = slice(start, end)
        batch = {
            "loss_masks": [torch.tensor(mask, dtype=torch.float32) for mask in masks[part]],
            "rollout_log_probs": [torch.tensor(sample) for sample in engine[part]],
            "response_lengths": [len(sample) for sample in trainer[part]],
        }
        metrics.add_all(mismatch(torch.cat([torch.tensor(sample) for sample in trainer[part]]), batch))
    return finish_mismatch(metrics.gather(contribute=True))


def test_every_estimate_is_its_definition_over_unmasked_tokens_and_samples():
    trainer, engine = [[-1.0, -2.0, -9.0], [-3.0], [-7.0]], [[-1.5, -1.0, 100.0], [-3.25], [100.0]]
    masks = [[1, 1, 0], [1], [0]]
    logs = [0.5, -1.0, 0.25]
    weights, sequences = [math.exp(x) for x in logs], [math.exp(-0.5), math.exp(0.25)]
    expected = {
        "logprob_gap_mean": 1.75 / 3,
        "logprob_gap_max": 1.0,
        "mismatch_k1": 0.25 / 3,
        "mismatch_k3": sum(math.exp(x) - 1 - x for x in logs) / 3,
        "mismatch_ess": sum(weights) ** 2 / (3 * sum(w * w for w in weights)),
        "mismatch_ess_samples": sum(sequences) ** 2 / (2 * sum(w * w for w in sequences)),
    }
    assert measured(trainer, engine, masks) == pytest.approx(expected, rel=1e-12)
    assert measured(trainer, engine, masks, parts=((0, 1), (1, 2), (2, 3))) == pytest.approx(expected, rel=1e-12)


def test_k3_of_two_fp32_policies_that_agree_is_not_lost_in_rounding():
    gap = 2.0**-20
    numbers = measured([[-1.0 + gap, -1.0 - gap]], [[-1.0, -1.0]])
    assert numbers["mismatch_k3"] == pytest.approx(gap * gap / 2, rel=1e-5)
    assert numbers["mismatch_k1"] == 0
    assert numbers["mismatch_ess"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(("far", "near"), [(0.0, -2000.0), (-4000.0, -4000.0), (-1e30, -1.0)])
def test_weights_that_no_number_can_hold_leave_one_sample_of_all_and_every_metric_finite(far, near):
    engine = [[-2000.0], [-2000.0], [-2000.0], [-2000.0]]
    numbers = measured([[far], [near], [near], [near]], engine)
    assert all(map(math.isfinite, numbers.values()))
    assert numbers["mismatch_ess"] == numbers["mismatch_ess_samples"] == 0.25


def test_nothing_is_reported_without_the_engines_log_probs_or_without_a_token():
    assert mismatch(torch.tensor([-1.0]), {"loss_masks": [torch.ones(1)]}) == {}
    assert measured([[-1.0]], [[-2.0]], [[0]]) == {"logprob_gap_max": 0.0}
    assert finish_mismatch({"loss": 1.0}) == {"loss": 1.0}


RUNS = {
    "recomputed": ObjectiveOptions(),
    "reused": ObjectiveOptions(use_rollout_logprobs=True),
    "corrected": ObjectiveOptions(use_tis=True),
}


@pytest.mark.parametrize("objective", RUNS.values(), ids=RUNS)
def test_every_run_reports_how_far_the_weights_that_generated_are_from_the_engine(hf_dir, tmp_path, objective):
    """With several steps on a rollout too, where only the first sees those weights."""
    batch = make_batch()
    _, first = train_once(make_config(hf_dir, num_steps_per_rollout=1), tmp_path, batch)
    whole = {name: value for name, value in first.items() if "mismatch" in name or "gap" in name}
    assert len(whole) == 6
    if objective.use_rollout_logprobs:
        # Only the samples of the first step are passed through the weights that generated them.
        batch = batch | {"rollout_log_probs": [list(values) for values in batch["rollout_log_probs"]]}
        half = {name: column[:8] for name, column in batch.items()}
        _, first = train_once(make_config(hf_dir, num_steps_per_rollout=1), tmp_path, half)
        whole = {name: first[name] for name in whole}
    config = make_config(hf_dir, objective, BatchingOptions(max_tokens_per_gpu=20))
    _, metrics = train_once(config, tmp_path, batch)
    assert {name: metrics[name] for name in whole} == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_supervised_training_on_an_engines_samples_reports_the_mismatch_too(hf_dir, tmp_path):
    batch = make_batch()
    del batch["rewards"]
    _, metrics = train_once(make_config(hf_dir, loss_type="sft_loss", num_steps_per_rollout=1), tmp_path, batch)
    assert 0 < metrics["train/mismatch_ess"] < 1
