"""Critic, reference and teacher beside the policy: what they add to a rollout, and how the critic is trained."""

from __future__ import annotations

import shutil
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_api.errors import DataError, MilesError, SampleError
from miles_api.record import read_dump
from miles_train.options import BatchingOptions, ModelsOptions, ObjectiveOptions, OptimizerOptions, ParallelOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, Started = tiny.make_batch, tiny.make_config, tiny.Started
PPO = {"advantage_estimator": "ppo", "lambd": 0.9, "gamma": 0.95}
CRITIC = ("value_loss", "value_clipfrac", "critic_grad_norm", "critic_lr")


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """A model of the same kind with other weights."""
    directory = str(tmp_path_factory.mktemp("other-model"))
    tiny.save_model(directory, seed=1)
    return directory


def hf_log_probs(directory, batch, temperature):
    """Return each sample's response log-probs according to transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    for tokens, length in zip(batch["tokens"], batch["response_lengths"], strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([tokens])).logits[0] / temperature, -1)[-length - 1 : -1]
        yield rows.gather(-1, torch.tensor(tokens[-length:])[:, None]).squeeze(-1).tolist()


@pytest.fixture(scope="module")
def recorded(hf_dir, other_dir, tmp_path_factory):
    """One rollout of a run with all models, in several micro-batches: its columns, metrics and hook calls."""
    file = tmp_path_factory.mktemp("recorded") / "train.miles"
    tiny.forget_calls()
    config = make_config(
        hf_dir,
        ObjectiveOptions(**PPO, kl_coef=0.1, use_kl_loss=True, use_opd=True),
        ModelsOptions(opd_teacher_load=other_dir),
        BatchingOptions(max_tokens_per_gpu=40),
        tiny.hooked(before_log_prob="note_log_prob", model_provider="FrozenEmbedding"),
        save_debug_train_data=str(file),
        rollout_temperature=0.7,
    )
    with Started(config) as trainer:
        report = trainer.train(0, make_batch())
        stats = tiny.stats_of(trainer)
        prefixes = [call["prefix"] for call in tiny.calls_of("before_log_prob")]
        built = len(tiny.calls_of("model_provider"))
    [record] = read_dump(file)
    return record.columns, report, prefixes, built, stats


def test_the_columns_of_other_models_are_log_probs_as_transformers_computes_them(recorded, hf_dir, other_dir):
    columns, *_ = recorded
    # The provider of this run halves the logits.
    for name, directory in (("log_probs", hf_dir), ("ref_log_probs", hf_dir), ("teacher_log_probs", other_dir)):
        for found, expected in zip(columns[name], hf_log_probs(directory, columns, 0.7 * 2), strict=True):
            assert found == pytest.approx(expected, abs=2e-5)


def test_the_reference_is_the_policy_until_that_is_trained(recorded):
    columns, report, *_ = recorded
    assert columns["ref_log_probs"] == columns["log_probs"]
    assert columns["teacher_log_probs"] != columns["log_probs"]
    assert report.metrics["train/kl_reward"] == 0
    assert report.metrics["train/kl_loss"] > 0  # of the second step


def test_a_fresh_critic_values_every_token_at_nothing(recorded):
    columns, report, *_ = recorded
    assert {value for values in columns["values"] for value in values} == {0.0}
    assert [len(values) for values in columns["values"]] == columns["response_lengths"]
    assert report.metrics["train/explained_variance"] == pytest.approx(0, abs=1e-6)


def test_each_model_is_built_by_the_provider_and_each_pass_is_announced(recorded):
    _, report, prefixes, built, stats = recorded
    assert prefixes == ["", "ref_", "teacher_"]
    assert built == 4
    assert stats["before_log_prob"] == (3, 0, 0)
    assert {"values", "log_probs", "ref_log_probs", "teacher_log_probs", "critic"} <= set(report.seconds)


def test_a_critic_learns_the_returns_of_a_batch_that_stays_the_same(hf_dir):
    """Returns are the rewards here, of which a value where a response begins can know nothing."""
    objective = ObjectiveOptions(advantage_estimator="ppo", value_clip=None)
    models = ModelsOptions(critic_lr=1e-2, num_critic_only_steps=19)
    optimizer = OptimizerOptions(lr=1e-5)
    with Started(make_config(hf_dir, objective, models, optimizer)) as trainer:
        rows = [trainer.train(i, make_batch()).metrics for i in range(12)]
    losses = [row["train/value_loss"] for row in rows]
    assert losses[0] == pytest.approx(0.5, abs=0.1)
    assert losses[-1] < 0.7 * losses[0]
    assert rows[-1]["train/explained_variance"] > 0.25
    assert {row["train/critic_lr"] for row in rows} == {1e-2}


def test_critic_only_rollouts_leave_the_policy_alone_and_the_next_one_does_not(hf_dir, tmp_path):
    config = make_config(hf_dir, ObjectiveOptions(**PPO), ModelsOptions(num_critic_only_steps=1))
    with Started(config) as trainer:
        before = tiny.weights_of(trainer, tmp_path / "before")
        first = trainer.train(0, make_batch()).metrics
        tiny.assert_same_weights(before, tiny.weights_of(trainer, tmp_path / "after"), atol=0)
        second = trainer.train(1, make_batch()).metrics
        assert tiny.differ(before, tiny.weights_of(trainer, tmp_path / "later"))
    assert not {"loss", "grad_norm", "samples_skipped", "skipped_steps"} & {name[len("train/") :] for name in first}
    assert first["train/tokens"] == second["train/tokens"] == sum(map(len, make_batch()["tokens"]))
    assert first["train/zero_gradient_steps"] == 0
    assert first["train/critic_grad_norm"] > 0
    assert second["train/skipped_steps"] == 0


def test_value_loss_trains_the_critic_for_the_whole_run(hf_dir, tmp_path):
    config = make_config(hf_dir, ObjectiveOptions(**PPO), loss_type="value_loss")
    with Started(config) as trainer:
        before = tiny.weights_of(trainer, tmp_path / "before")
        rows = [trainer.train(i, make_batch()).metrics for i in (0, 1)]
        tiny.assert_same_weights(before, tiny.weights_of(trainer, tmp_path / "after"), atol=0)
    assert rows[1]["train/value_loss"] < rows[0]["train/value_loss"]


def test_the_critic_is_trained_on_samples_that_are_left_out_for_the_policy(hf_dir, tmp_path):
    """Its first step is that of a run that leaves none out; samples whose reward is that of all have no advantage."""
    rows = {}
    for skip in (False, True):
        objective = ObjectiveOptions(advantage_estimator="ppo", normalize_advantages=False, skip_zero_advantage=skip)
        _, rows[skip] = tiny.train_once(
            make_config(hf_dir, objective), tmp_path / str(skip), make_batch(dead_groups=(0, 3))
        )
    assert (rows[False]["train/samples_skipped"], rows[True]["train/samples_skipped"]) == (0, 8)
    for name in CRITIC:
        assert rows[True][f"train/{name}"] == pytest.approx(rows[False][f"train/{name}"], rel=1e-6), name
    assert rows[True]["train/critic_grad_norm"] > 0


@pytest.mark.parametrize("sharded", [False, True])
def test_a_trainer_with_a_critic_continues_after_a_load_bitwise(hf_dir, other_dir, tmp_path, sharded):
    parallel = ParallelOptions(use_distributed_optimizer=sharded)
    config = make_config(hf_dir, parallel, ObjectiveOptions(**PPO, kl_coef=0.1), ModelsOptions(ref_load=other_dir))
    with Started(config) as trainer:
        trainer.train(0, make_batch(seed=0))
        trainer.save(0, str(tmp_path / "checkpoint"))
        straight = [trainer.train(i, make_batch(seed=i)).metrics for i in (1, 2)]
        weights = tiny.weights_of(trainer, tmp_path / "straight")
    with Started(config) as trainer:
        trainer.load(0, str(tmp_path / "checkpoint"))
        assert [trainer.train(i, make_batch(seed=i)).metrics for i in (1, 2)] == straight
        tiny.assert_same_weights(weights, tiny.weights_of(trainer, tmp_path / "resumed"), atol=0)
    with Started(make_config(hf_dir, parallel)) as trainer:
        trainer.load(0, str(tmp_path / "checkpoint"))
        trainer.save(0, str(tmp_path / "without"))
    with Started(config) as trainer, pytest.raises(DataError, match=r"without holds no critic: .* as --hf-checkpoint"):
        trainer.load(0, str(tmp_path / "without"))


def test_a_number_that_is_none_in_another_models_column_names_column_and_sample(hf_dir):
    config = make_config(hf_dir, ObjectiveOptions(**PPO, kl_coef=0.1))
    with Started(config) as trainer:
        models = trainer._models
        for model, column in ((models.critic.model, "values"), (models.reference, "ref_log_probs")):
            weight = next(model[0].parameters()).data
            kept, weight[7] = weight[7].clone(), torch.nan
            with pytest.raises(MilesError, match=rf"^{column} of sample \d+ in rollout 3 is nan at position \d"):
                trainer.train(3, make_batch())
            weight[7] = kept


def test_a_rollouts_own_teacher_column_is_used_and_a_second_teacher_is_refused(hf_dir, other_dir, tmp_path):
    batch = make_batch()
    batch["teacher_log_probs"] = [[-1.0] * n for n in batch["response_lengths"]]
    _, metrics = tiny.train_once(make_config(hf_dir, ObjectiveOptions(use_opd=True)), tmp_path, batch)
    assert metrics["train/opd_kl"] == pytest.approx(1 - 3.47, abs=0.2)
    config = make_config(hf_dir, ObjectiveOptions(use_opd=True), ModelsOptions(opd_teacher_load=other_dir))
    with Started(config) as trainer, pytest.raises(SampleError, match="leave the flag out to use the rollout's"):
        trainer.train(0, batch)


def test_a_reference_that_lacks_a_weight_is_refused_with_its_flag(hf_dir, other_dir, tmp_path):
    tensors = load_file(f"{other_dir}/model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(f"{other_dir}/config.json", tmp_path)
    config = make_config(hf_dir, ObjectiveOptions(use_kl_loss=True), ModelsOptions(ref_load=str(tmp_path)))
    started = Started(config)
    try:
        with pytest.raises(DataError, match=r"^--ref-load: .*weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
            started.trainer.start()
    finally:
        started.trainer.stop()
