"""Hooks that are moments in the life of a trainer rank, and the one that builds its model."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from miles_api.errors import ConfigError
from miles_train.options import ObjectiveOptions, OptimizerOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, train_once = tiny.make_batch, tiny.make_config, tiny.train_once
assert_same_weights, differ = tiny.assert_same_weights, tiny.differ
hooked, calls_of = tiny.hooked, tiny.calls_of


@pytest.fixture(autouse=True)
def _no_calls():
    tiny.forget_calls()


def test_a_learning_rate_set_before_a_step_takes_effect(hf_dir, tmp_path):
    steps = hooked(before_train_step=["half_rate", "note_step"])
    found, metrics = train_once(make_config(hf_dir, steps), tmp_path / "a", make_batch())
    slow = OptimizerOptions(lr=tiny.LR / 2, adam_eps=1e-2)
    expected, _ = train_once(make_config(hf_dir, slow), tmp_path / "b", make_batch())
    assert_same_weights(expected, found)
    assert metrics["train/lr"] == pytest.approx(tiny.LR / 2)
    assert [call["where"] for call in calls_of("before_train_step")] == [(0, 0), (0, 1)]
    assert calls_of("before_train_step")[0]["kinds"] == ["list", "ChainedOptimizer"]
    assert calls_of("second before_train_step")[1] == {"where": (0, 1), "rate": tiny.LR / 2}


def test_hooks_of_a_step_in_which_nothing_runs_are_counted_as_skipped(hf_dir):
    options = hooked(before_train_step="note_step", pg_loss_reducer="plain_reducer", before_log_prob="note_log_prob")
    with tiny.Started(make_config(hf_dir, ObjectiveOptions(skip_zero_advantage=True), options)) as trainer:
        trainer.train(0, make_batch(dead_groups=(0, 1, 2, 3)))
        nothing = tiny.stats_of(trainer)
        trainer.train(1, make_batch(dead_groups=(2, 3)))
        half = tiny.stats_of(trainer)
    assert nothing == {"before_train_step": (0, 2, 0), "pg_loss_reducer": (0, 2, 0), "before_log_prob": (0, 1, 0)}
    assert half == {"before_train_step": (1, 3, 0), "pg_loss_reducer": (1, 3, 0), "before_log_prob": (0, 2, 0)}


def test_megatron_is_ready_and_no_model_is_built_when_the_init_hook_is_called(hf_dir):
    with tiny.Started(make_config(hf_dir, hooked(megatron_init="note_init", model_provider="FrozenEmbedding"))):
        assert calls_of("megatron_init") == [{"ready": True, "loss_type": "policy_loss"}]
    names = [name for name, _ in tiny.all_calls()]
    assert names == ["megatron_init", "model_provider", "closed"]


def test_the_post_save_hook_gets_the_finished_checkpoint(hf_dir, tmp_path):
    with tiny.Started(make_config(hf_dir, hooked(post_save="note_save"))) as trainer:
        trainer.saved(7, "checkpoints/rollout_000007", None)
    assert calls_of("post_save") == [{"what": (7, "checkpoints/rollout_000007", None)}]


def test_a_provider_that_changes_the_model_trains_saves_loads_and_exports(hf_dir, tmp_path):
    config = make_config(hf_dir, hooked(model_provider="FrozenEmbedding"), num_steps_per_rollout=1)
    with tiny.Started(config) as trainer:
        before = tiny.weights_of(trainer, tmp_path / "before")
        trainer.train(0, make_batch())
        trainer.save(0, str(tmp_path / "checkpoint"))
        trainer.train(1, make_batch(seed=1))
        straight = tiny.weights_of(trainer, tmp_path / "straight")
    with tiny.Started(config) as trainer:
        trainer.load(0, str(tmp_path / "checkpoint"))
        trainer.train(1, make_batch(seed=1))
        assert_same_weights(straight, tiny.weights_of(trainer, tmp_path / "resumed"), atol=0)
    plain, _ = train_once(make_config(hf_dir, num_steps_per_rollout=1), tmp_path / "plain", make_batch())
    assert torch.equal(before["model.embed_tokens.weight"], straight["model.embed_tokens.weight"])
    assert differ(before, straight)
    assert differ(plain, straight)
    asked = calls_of("model_provider")[0]
    assert asked == {
        "pre_process": "bool", "post_process": "bool", "vp_stage": "NoneType", "config": "TransformerConfig",
        "hf_config": "dict", "pg_collection": "ProcessGroupCollection", "args": "Args",
    }  # fmt: skip


def test_a_provider_that_adds_a_parameter_is_refused_by_its_name(hf_dir):
    config = make_config(hf_dir, hooked(model_provider="extra_parameter"))
    trainer = tiny.Trainer(config, **tiny.meeting())
    with pytest.raises(ConfigError, match="a parameter gate, for which a Hugging Face checkpoint has no place"):
        trainer.start()
    trainer.stop()
