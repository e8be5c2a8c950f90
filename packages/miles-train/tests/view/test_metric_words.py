"""Every number of a run has words."""

from __future__ import annotations

from importlib import import_module

import pytest

from miles_train.options import BatchingOptions, ObjectiveOptions
from miles_train.view.metric_words import explain

tiny = import_module("packages.miles-train.tests.tiny_trainer")

RUNS = {
    "plain": [],
    "everything in the loss": [
        ObjectiveOptions(
            use_tis=True, entropy_coef=0.01, use_kl_loss=True, kl_loss_coef=0.1, kl_coef=0.1,
            advantage_estimator="reinforce_plus_plus",
        )
    ],
    "a teacher": [ObjectiveOptions(use_opd=True, use_rollout_logprobs=True)],
    "a critic": [ObjectiveOptions(advantage_estimator="ppo")],
    "micro-batches of fixed size": [BatchingOptions(use_dynamic_batch_size=False, micro_batch_size=2)],
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_whatever_a_trainer_reports_is_explained(hf_dir, tmp_path, name):
    batch = tiny.make_batch(dead_groups=(0, 1))
    batch["teacher_log_probs"] = batch["rollout_log_probs"]
    config = tiny.make_config(hf_dir, *RUNS[name], num_steps_per_rollout=1 + (name == "plain"))
    _, metrics = tiny.train_once(config, tmp_path, batch)
    assert len(metrics) > 10
    assert not [metric for metric in metrics if not explain(metric)]
