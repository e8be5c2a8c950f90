"""A number that is not finite stops training where it arises: sample, tensor and hook are named, no weight changes."""

from __future__ import annotations

import math
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_api.errors import MilesError
from miles_api.hook_options import HookOptions
from miles_train.options import ModelsOptions, ObjectiveOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, weights_of = tiny.make_batch, tiny.make_config, tiny.weights_of

HOOKS = """
import torch

def convert(args, samples, *, raw_rewards, rewards):
    return {}

def finite_loss_without_finite_gradient(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy):
    log_probs = torch.cat(log_probs_and_entropy(logits)[0])
    # sqrt has no slope at 0
    return sum_of_sample_mean(log_probs) + (log_probs[-1] * 0).sqrt(), {}

def huge_weights(args, *, pg_loss, loss_masks):
    weights = torch.ones_like(pg_loss)
    weights[4] = float("inf")
    return pg_loss * weights, loss_masks, {}

def bad_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values.sum() / sum(mask.sum() * 0 for mask in loss_masks)
"""


@pytest.fixture(scope="module")
def hook_file(tmp_path_factory):
    file = tmp_path_factory.mktemp("hooks") / "bad.py"
    file.write_text(HOOKS)
    return file


@pytest.fixture(scope="module")
def broken_dir(hf_dir, tmp_path_factory):
    """Return a model directory in which the embedding of one token is NaN."""
    directory = tmp_path_factory.mktemp("broken")
    for file in Path(hf_dir).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    weights = load_file(directory / "model.safetensors")
    weights["model.embed_tokens.weight"][int(make_batch()["tokens"][5][-2])] = math.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def with_one(column, value, sample=5):
    """Return a rollout in which one number of a column is `value`."""
    batch = make_batch()
    batch.setdefault(column, [[-1.0] * n for n in batch["response_lengths"]])
    values = list(batch[column])
    values[sample] = [*values[sample][:-1], value] if isinstance(values[sample], list) else value
    return batch | {column: values}


def stops(config, batch, tmp_path):
    """Train a rollout that has to fail; return the error once it is sure that no weight has changed."""
    with tiny.Started(config) as trainer:
        before = weights_of(trainer, tmp_path / "before")
        with pytest.raises(MilesError) as caught:
            trainer.train(7, batch)
        tiny.assert_same_weights(before, weights_of(trainer, tmp_path / "after"), atol=0)
    return str(caught.value)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rewards", math.nan, "the reward of sample 105{by} in rollout 7 is nan"),
        ("rewards", 1e39, "returns of sample 105 in rollout 7 is inf at position 0 of 4"),
        ("rollout_log_probs", -math.inf, "rollout_log_probs of sample 105{by} in rollout 7 is -inf at position 3 of 4"),
        ("teacher_log_probs", math.nan, "teacher_log_probs of sample 105{by} in rollout 7 is nan at position 3 of 4"),
        ("loss_masks", math.nan, "loss_masks of sample 105{by} in rollout 7 is nan at position 3 of 4"),
    ],
)
def test_a_number_that_the_rollout_brought_names_the_hook_that_made_the_columns(
    hf_dir, hook_file, tmp_path, column, value, message
):
    hook = f"{hook_file}:convert"
    batch = with_one(column, value)
    by = f" (its column was made by the convert_samples hook {hook})"
    hooks = HookOptions(custom_convert_samples_to_train_data_path=hook)
    assert message.format(by=by) in stops(make_config(hf_dir, hooks), batch, tmp_path)
    assert message.format(by="") in stops(make_config(hf_dir), batch, tmp_path)


MODELS = {
    "ref_log_probs": ("ref_load", ObjectiveOptions(use_kl_loss=True, kl_loss_coef=0.1)),
    "teacher_log_probs": ("opd_teacher_load", ObjectiveOptions(use_opd=True)),
    "values": ("critic_load", ObjectiveOptions(advantage_estimator="ppo")),
}


@pytest.mark.parametrize("column", MODELS)
def test_a_broken_model_beside_the_policy_is_noticed_in_its_column(hf_dir, broken_dir, tmp_path, column):
    option, objective = MODELS[column]
    config = make_config(hf_dir, objective, ModelsOptions(**{option: broken_dir}))
    message = stops(config, make_batch(), tmp_path)
    assert message.startswith(f"{column} of sample 10")
    assert " in rollout 7 is nan at position " in message


@pytest.mark.parametrize("rewarded", [True, False], ids=["the gradient", "the loss"])
def test_a_ratio_too_large_for_a_number_is_named_and_not_the_loss_or_gradient_that_it_spoils(
    hf_dir, tmp_path, rewarded
):
    """Where the advantage is positive the clipped loss is finite, and only its gradient is not."""
    sample = 5 if rewarded else 4
    batch = with_one("rollout_log_probs", -200.0, sample)
    batch["loss_masks"] = [[1] * len(mask) for mask in batch["loss_masks"]]
    message = stops(make_config(hf_dir, ObjectiveOptions(use_rollout_logprobs=True)), batch, tmp_path)
    assert message.startswith(
        f"the importance ratio exp(log_prob - old log_prob) of sample 10{sample} in rollout 7, step 0 is inf at"
    )


@pytest.mark.parametrize(
    ("hook", "name", "message"),
    [
        (
            "loss",
            "finite_loss_without_finite_gradient",
            "the gradient of the loss of the loss hook {hook} by log_probs of sample 107 in rollout 7, step 0 is nan",
        ),
        (
            "importance_weights",
            "huge_weights",
            "the importance_weights hook {hook}: 'pg_loss' of sample 101 in rollout 7, step 0 is",
        ),
        (
            "pg_loss_reducer",
            "bad_reducer",
            "the loss (through the pg_loss_reducer hook {hook}) in rollout 7, step 0 is",
        ),
    ],
)
def test_a_hook_that_makes_loss_or_gradient_infinite_is_named(hf_dir, hook_file, tmp_path, hook, name, message):
    reference = f"{hook_file}:{name}"
    options = [HookOptions(**{tiny.FLAGS[hook]: reference}), ObjectiveOptions(use_tis=hook == "importance_weights")]
    config = make_config(hf_dir, *options, loss_type="custom_loss" if hook == "loss" else "policy_loss")
    assert message.format(hook=reference) in stops(config, make_batch(), tmp_path)


def test_a_gradient_that_breaks_inside_the_model_names_a_parameter(hf_dir, tmp_path):
    with tiny.Started(make_config(hf_dir)) as trainer:
        before = weights_of(trainer, tmp_path / "before")
        norm = trainer._model[0].module.decoder.final_layernorm.weight
        norm.register_hook(lambda gradient: gradient * math.nan)
        with pytest.raises(MilesError, match=r"gradient norm is nan: 32 of 32 gradients of decoder.final_layernorm"):
            trainer.train(7, make_batch())
        tiny.assert_same_weights(before, weights_of(trainer, tmp_path / "after"), atol=0)


def test_truncated_importance_sampling_survives_a_weight_too_large_for_a_number(hf_dir, tmp_path):
    batch = with_one("rollout_log_probs", -200.0)
    batch["loss_masks"] = [[1] * len(mask) for mask in batch["loss_masks"]]
    _, metrics = tiny.train_once(make_config(hf_dir, ObjectiveOptions(use_tis=True)), tmp_path, batch)
    assert math.isfinite(metrics["train/grad_norm"])
    assert math.isfinite(metrics["train/mismatch_k3"])
    assert metrics["train/mismatch_ess"] < 0.02


def test_a_critics_loss_that_breaks_names_the_critics_values(hf_dir, tmp_path):
    config = make_config(hf_dir, ObjectiveOptions(advantage_estimator="ppo"), num_steps_per_rollout=1)
    with tiny.Started(config) as trainer:
        critic = trainer._learner._models.critic
        values = trainer._learner._passes.values

        def then_break(model, packed):
            column = values(model, packed)
            next(critic.model[0].parameters()).data.fill_(torch.nan)
            return column

        trainer._learner._passes.values = then_break
        with pytest.raises(MilesError, match=r"^values of sample 100 in rollout 7, step 0 is nan"):
            trainer.train(7, make_batch())
