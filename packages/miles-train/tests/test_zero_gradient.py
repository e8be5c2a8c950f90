"""Steps that change nothing are counted, with the reason."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from miles_api.hook_options import HookOptions
from miles_train.metrics import Metrics
from miles_train.options import ObjectiveOptions, OptimizerOptions
from miles_train.seen import Seen
from miles_train.view.metric_words import CAUSES
from miles_train.zero_gradient import count_zero_gradients, note_zero_gradient

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, train_once = tiny.make_batch, tiny.make_config, tiny.train_once

DEAD = (0, 1, 2, 3)
NOTHING_LEFT = """
import torch
def correct(args, *, pg_loss, loss_masks):
    return pg_loss, [torch.zeros_like(mask) for mask in loss_masks], {}
"""


def all_masked():
    batch = make_batch()
    return batch | {"loss_masks": [[0] * n for n in batch["response_lengths"]]}


def all_clipped():
    """Say that the engine found rewarded tokens far less likely than the trainer does, and others far likelier."""
    batch = make_batch(dead_groups=(1,))
    samples = zip(batch["rewards"], batch["response_lengths"], strict=True)
    return batch | {"rollout_log_probs": [[-30.0 if reward > 0 else 0.0] * length for reward, length in samples]}


SILENT = {
    "zero_advantages": (make_batch(dead_groups=DEAD), ObjectiveOptions()),
    "zero_advantages, left out": (make_batch(dead_groups=DEAD), ObjectiveOptions(skip_zero_advantage=True)),
    "masked": (all_masked(), ObjectiveOptions()),
    "masked, left out": (all_masked(), ObjectiveOptions(skip_zero_advantage=True)),
    "clipped": (all_clipped(), ObjectiveOptions(use_rollout_logprobs=True)),
    "learning_rate": (make_batch(), OptimizerOptions(lr=0.0)),
    "no_gradient": (make_batch(), ObjectiveOptions(use_tis=True)),
}


@pytest.mark.parametrize("case", SILENT)
def test_a_step_that_changes_nothing_is_counted_under_its_cause(hf_dir, tmp_path, case):
    cause, (batch, options) = case.partition(",")[0], SILENT[case]
    (tmp_path / "nothing.py").write_text(NOTHING_LEFT)
    correction = f"{tmp_path / 'nothing.py'}:correct" if cause == "no_gradient" else None
    config = make_config(hf_dir, options, HookOptions(custom_tis_function_path=correction))
    _, metrics = train_once(config, tmp_path / "weights", batch)
    assert metrics["train/zero_gradient_steps"] == 2
    assert {name for name in metrics if "zero_" in name} == {
        "train/zero_gradient_steps",
        f"train/zero_gradient/{cause}",
    }
    assert metrics[f"train/zero_gradient/{cause}"] == 2
    assert cause in CAUSES


CANCELLED = """
def correct(args, *, pg_loss, loss_masks):
    return pg_loss * 0.0, loss_masks, {}
"""


@pytest.mark.parametrize("loss_type", ["clip", "cispo"])
def test_a_step_whose_tokens_were_cancelled_is_not_called_clipped_for_one_that_was(hf_dir, tmp_path, loss_type):
    (tmp_path / "cancel.py").write_text(CANCELLED)
    batch = make_batch() if loss_type == "clip" else all_clipped()
    if loss_type == "clip":
        # Of the rewarded samples one is far likelier to the trainer than it was to the engine.
        batch["rollout_log_probs"][1] = [-30.0] * batch["response_lengths"][1]
    options = ObjectiveOptions(use_tis=True, use_rollout_logprobs=True, policy_loss_type=loss_type)
    hook = HookOptions(custom_tis_function_path=f"{tmp_path / 'cancel.py'}:correct")
    config = make_config(hf_dir, options, hook, num_steps_per_rollout=1)
    _, metrics = train_once(config, tmp_path / "weights", batch)
    assert metrics["train/pg_clipfrac"] > 0
    assert metrics["train/zero_gradient/no_gradient"] == 1
    assert "train/zero_gradient/clipped" not in metrics


def test_steps_that_train_are_not_counted_and_those_beside_them_are(hf_dir, tmp_path):
    _, training = train_once(make_config(hf_dir), tmp_path, make_batch())
    assert training["train/zero_gradient_steps"] == 0
    assert not [name for name in training if "zero_gradient/" in name]
    for skip in (False, True):
        config = make_config(hf_dir, ObjectiveOptions(skip_zero_advantage=skip))
        _, half = train_once(config, tmp_path, make_batch(dead_groups=(2, 3)))
        assert (half["train/zero_gradient_steps"], half["train/zero_gradient/zero_advantages"]) == (1, 1)


def test_a_gradient_that_the_weights_never_saw_is_told_from_one_that_was_not_there():
    batch = {"loss_masks": [torch.ones(2)], "advantages": [torch.ones(2)]}
    counts = {}
    for name, pull in {"lost": 0.5, "no_gradient": 0.0}.items():
        metrics = Metrics()
        seen = [Seen(batch, torch.zeros(2), torch.zeros(()), [torch.tensor([0.0, pull])])]
        note_zero_gradient(metrics, 3, norm=0.0, rate=1.0, seen=seen, results=[{"pg_clipfrac": torch.tensor(0.0)}])
        counts[name] = count_zero_gradients(metrics.gather(contribute=True))
    assert counts == {name: {"zero_gradient_steps": 1, f"zero_gradient/{name}": 1} for name in counts}
