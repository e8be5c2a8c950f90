"""What is known of the models beside the policy before anything starts."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from miles_api.hook_options import HookOptions
from miles_api.run_options import RunOptions
from miles_train.driver.checkpoint import State
from miles_train.driver.identity import identity_of, mismatches
from miles_train.models_check import check_models, models_notes
from miles_train.options import ModelsOptions, ObjectiveOptions, OptimizerOptions, ParallelOptions
from miles_train.train_hooks import check_train_hooks, idle_train_hooks

make_config = import_module("packages.miles-train.tests.tiny_trainer").make_config
MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}  # fmt: skip
PPO = ObjectiveOptions(advantage_estimator="ppo")
USERS = {
    "--ref-load": ObjectiveOptions(use_kl_loss=True),
    "--opd-teacher-load": ObjectiveOptions(use_opd=True),
    "--critic-load": PPO,
}
"""Each flag with options that need its model."""


@pytest.fixture
def model(tmp_path):
    """Return a function that writes a model directory with an empty file of weights."""

    def make(name="policy", weights=True, **changes):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(MODEL | changes))
        if weights:
            (folder / "model.safetensors").touch()
        return str(folder)

    return make


def loading(flag, directory):
    return ModelsOptions(**{flag[2:].replace("-", "_"): directory})


@pytest.mark.parametrize("flag", USERS)
@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"vocab_size": 34}, "has a vocabulary of 34 tokens and --hf-checkpoint"),
        ({"weights": False}, "holds no weights"),
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM is not supported"),
        ({"num_key_value_heads": 1}, "num_key_value_heads = 1 cannot be divided over --tensor-model-parallel-size 2"),
    ],
)
def test_a_directory_that_cannot_serve_is_named_with_its_flag(model, flag, changes, problem):
    policy, other = model(), model("other", **changes)
    parallel = ParallelOptions(actor_num_gpus_per_node=2, tensor_model_parallel_size=2)
    (text,) = check_models(make_config(policy, USERS[flag], loading(flag, other), parallel))
    assert text.startswith(flag)
    assert problem in text
    assert other in text


def test_without_flags_the_models_are_those_of_the_policys_directory(model):
    policy = model()
    config = make_config(policy, ObjectiveOptions(advantage_estimator="ppo", kl_coef=0.1))
    assert list(check_models(config)) == []
    assert list(models_notes(config)) == [f"models beside the policy: critic {policy}, reference {policy}"]
    assert list(models_notes(make_config(policy, loss_type="sft_loss"))) == []


def test_distillation_without_anything_that_could_bring_a_teacher_is_refused_before_a_start(model):
    policy, wanted = model(), ObjectiveOptions(use_opd=True)
    [problem] = check_models(make_config(policy, wanted))
    assert "--opd-teacher-load" in problem
    assert not list(check_models(make_config(policy, wanted, ModelsOptions(opd_teacher_load=policy))))
    asks = HookOptions(custom_reward_post_process_path="teacher.py:ask")
    assert not list(check_models(make_config(policy, wanted, asks)))
    assert not list(check_models(make_config(policy, wanted, load_debug_rollout_data="rollouts.bin")))


def test_value_loss_needs_an_estimator_with_a_critic(model):
    policy = model()
    (text,) = check_train_hooks(make_config(policy, loss_type="value_loss"))
    assert text.endswith("pass --advantage-estimator ppo")
    config = make_config(policy, PPO, loss_type="value_loss")
    assert list(check_train_hooks(config)) == []
    assert any("trains the critic alone" in note for note in models_notes(config))


@pytest.mark.parametrize(
    ("options", "run", "called"),
    [
        (ObjectiveOptions(use_rollout_logprobs=True), {}, False),
        (ObjectiveOptions(use_rollout_logprobs=True, use_kl_loss=True), {}, True),
        (ObjectiveOptions(use_kl_loss=True), {"num_steps_per_rollout": 1}, True),
        (ObjectiveOptions(use_opd=True, use_rollout_logprobs=True), {}, False),  # the rollout brings the column
        (ObjectiveOptions(advantage_estimator="ppo"), {"num_steps_per_rollout": 1}, False),
        (ObjectiveOptions(advantage_estimator="ppo"), {"loss_type": "value_loss"}, False),
        (ObjectiveOptions(advantage_estimator="ppo", kl_coef=0.1), {"loss_type": "value_loss"}, True),
    ],
)
def test_a_run_with_any_pass_for_log_probs_calls_the_hook_before_it(model, options, run, called):
    config = make_config(model(), options, ModelsOptions(), OptimizerOptions(), **run)
    assert ("before_log_prob" not in idle_train_hooks(config)) is called


def test_a_checkpoint_without_this_runs_critic_is_refused_and_one_with_a_critic_serves_any_run(model):
    policy, other = model(), model("other", hidden_size=64)
    plain, ppo, large = (
        make_config(policy, *options, load_debug_rollout_data="rollouts.miles")
        for options in ([], [PPO], [PPO, ModelsOptions(critic_load=other)])
    )
    assert plain.group(RunOptions).hf_checkpoint == policy

    def refused(saved, now):
        state = State(rollout_id=0, weight_version=1, identity=identity_of(saved))
        return list(mismatches(state, now, Path("saved")))

    (without,) = refused(plain, ppo)
    assert "was saved with critic None; this run has critic " in without
    assert "begin without it, with the checkpoint's own hf directory as --hf-checkpoint" in without
    assert len(refused(large, ppo)) == 1
    assert refused(ppo, plain) == refused(ppo, ppo) == []
