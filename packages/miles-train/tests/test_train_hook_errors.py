"""What a train-side hook may not do, and how the error says which hook, which sample, which field."""

from __future__ import annotations

import traceback
from importlib import import_module

import pytest
import torch

from miles_api.errors import ConfigError, HookResultError, MilesError
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import bind
from miles_train.importance import truncated_importance_sampling
from miles_train.options import ObjectiveOptions
from miles_train.train_hooks import TRAIN_HOOKS, HookCalls, check_train_hooks, idle_train_hooks

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, hooked = tiny.make_batch, tiny.make_config, tiny.hooked


def run(hf_dir, hook, name):
    """Train one step with a hook; return its row of the report and the error."""
    options = [hooked(**{hook: name}), ObjectiveOptions(use_tis=hook == "importance_weights")]
    kind = "custom_loss" if hook == "loss" else "policy_loss"
    with tiny.Started(make_config(hf_dir, *options, loss_type=kind, num_steps_per_rollout=1)) as trainer:
        with pytest.raises(Exception, match=r".") as caught:
            trainer.train(4, make_batch())
        return trainer.report()[0], caught.value


@pytest.mark.parametrize(
    ("hook", "name", "message"),
    [
        ("loss", "loss_is_nan", r"is nan for the micro-batch of samples 100, 101"),
        ("loss", "loss_is_detached", "the loss has no gradient"),
        ("loss", "loss_is_a_vector", r"the loss must be a scalar tensor, it is a tensor of shape \(32,\)"),
        ("loss", "loss_alone", r"it must return \(loss, metrics\)"),
        ("loss", "loss_with_a_tensor_metric", r"the metric 'mine' must be a number or a scalar tensor, it is a tensor"),
        ("loss", "loss_with_our_metric", "the metric 'lr' has the name of one that the trainer reports"),
        ("loss", "loss_with_a_reserved_metric", "the metric 'zero_step_0_rate_max' has the name of one that the"),
        ("pg_loss_reducer", "reducer_of_nothing", "must return a function from token losses to their sum"),
        ("pg_loss_reducer", "reducer_to_a_vector", "the reduced loss must be a scalar tensor"),
        (
            "importance_weights",
            "weights_with_nan",
            r": 'pg_loss' of sample 101 in rollout 4, step 0 is nan at position 1 of 3",
        ),
        ("importance_weights", "weights_without_gradient", "'pg_loss' has no gradient"),
        ("importance_weights", "weights_with_short_masks", r"'loss_masks' of sample 100 must be a 1-D tensor of 2"),
        ("importance_weights", "weights_with_a_scalar_metric", r"the metric 'mine' must be a 1-D tensor of \d+"),
        ("importance_weights", "weights_alone", r"it must return \(pg_loss, loss_masks, metrics\)"),
        ("advantage", "no_returns", "'returns' must be a list of 16 tensors, it is None"),
        ("advantage", "infinite_advantage", r": 'advantages' of sample 101 in rollout 4 is inf at position 0 of 3"),
        ("advantage", "long_advantage", r"'advantages' of sample 102 .* of 4 response tokens, it is .*\(99,\)"),
        ("advantage", "advantages_without_masks", "'loss_masks' must be a list of 16 tensors, it is None"),
        ("advantage", "advantages_and_other_tokens", "'tokens' may not change here"),
        ("rollout_data_postprocess", "changes_tokens", "'tokens' may not change here"),
        ("rollout_data_postprocess", "changes_lengths", "'response_lengths' may not change here"),
        ("rollout_data_postprocess", "drops_a_mask", "'loss_masks' must be a list of 16 tensors, it is 15 entries"),
        (
            "rollout_data_postprocess",
            "infinite_mask",
            r": 'loss_masks' of sample 100 in rollout 4 is -inf at position 1",
        ),
        ("rollout_data_postprocess", "takes_our_column", "column 'rollout_mask_sums' is computed by the trainer"),
        ("rollout_data_postprocess", "short_column", "column 'mine' must be a list with one entry for each of 16"),
    ],
)
def test_a_result_that_does_not_fit_names_hook_reference_rollout_and_field(hf_dir, hook, name, message):
    row, error = run(hf_dir, hook, name)
    with pytest.raises(MilesError, match=message):
        raise error
    assert f"the {hook} hook {tiny.HOOKS}:{name}" in str(error)
    assert " in rollout 4" in str(error)
    if name != "loss_is_nan":
        assert isinstance(error, HookResultError)
        assert row["errors"] == 1


def test_an_exception_of_a_hook_is_the_users_own_and_says_which_hook_and_when(hf_dir):
    row, error = run(hf_dir, "before_train_step", "raises")
    assert isinstance(error, ZeroDivisionError)
    text = "".join(traceback.format_exception(error))
    assert "the hook's own" in text
    assert f"raised by the before_train_step hook {tiny.HOOKS}:raises" in text
    assert "on trainer rank in rollout 4, step 0" in text
    assert (row["calls"], row["errors"]) == (1, 1)


def test_broken_weights_are_not_blamed_on_the_correction(hf_dir):
    options = [ObjectiveOptions(use_tis=True), hooked(importance_weights="sample_by_sample_tis")]
    with tiny.Started(make_config(hf_dir, *options, num_steps_per_rollout=1)) as trainer:
        next(trainer._model[0].parameters()).data[7].fill_(torch.nan)
        with pytest.raises(MilesError, match=r"^log_probs of sample \d+ in rollout 3, step 0 is nan"):
            trainer.train(3, make_batch())


def test_a_provider_that_returns_another_module_is_refused(hf_dir):
    trainer = tiny.Started(make_config(hf_dir, hooked(model_provider="no_model"))).trainer
    with pytest.raises(HookResultError, match=r"model_provider hook .*must return a GPTModel, it returned a Linear"):
        trainer.start()
    trainer.stop()


def test_a_hook_that_does_not_load_stops_the_trainer_before_anything_starts(hf_dir):
    with pytest.raises(ConfigError, match=r"--custom-loss-function-path .*has no 'ppo_los'; did you mean 'ppo_loss'"):
        tiny.Started(make_config(hf_dir, hooked(loss="ppo_los"), loss_type="custom_loss"))


@pytest.mark.parametrize(
    ("options", "run", "message"),
    [
        ([], {"loss_type": "custom_loss"}, "custom_loss needs --custom-loss-function-path"),
        ([], {"loss_type": "value_loss"}, "--advantage-estimator grpo has none: pass --advantage-estimator ppo"),
        ([ObjectiveOptions(use_tis=True)], {"loss_type": "sft_loss"}, "--use-tis belongs to --loss-type policy_loss"),
        ([ObjectiveOptions(use_tis=True, use_rollout_logprobs=True)], {}, "would correct twice"),
        ([ObjectiveOptions(tis_clip=0.5, tis_clip_low=0.6)], {}, "--tis-clip 0.5 is below --tis-clip-low 0.6"),
    ],
)
def test_an_objective_that_contradicts_itself_is_refused(hf_dir, options, run, message):
    config = make_config(hf_dir, *options, **run)
    assert any(message in problem for problem in check_train_hooks(config))
    with pytest.raises(ConfigError, match=message):
        tiny.Started(config)


@pytest.mark.parametrize(
    ("options", "run", "idle"),
    [
        ([], {}, {"loss", "importance_weights"}),
        ([ObjectiveOptions(get_mismatch_metrics=True)], {"num_steps_per_rollout": 1}, {"loss", "before_log_prob"}),
        ([], {"loss_type": "custom_loss"}, {"importance_weights", "pg_loss_reducer"}),
        (
            [],
            {"loss_type": "sft_loss"},
            {"loss", "advantage", "importance_weights", "pg_loss_reducer", "before_log_prob"},
        ),
        (
            [hooked(advantage="no_returns"), ObjectiveOptions(use_rollout_logprobs=True)],
            {},
            {"loss", "importance_weights", "before_log_prob"},
        ),
        ([], {"debug_rollout_only": True}, set(TRAIN_HOOKS)),
    ],
)
def test_hooks_that_a_run_would_not_call_are_known_before_it_starts(hf_dir, options, run, idle):
    assert set(idle_train_hooks(make_config(hf_dir, *options, **run))) == idle


def test_truncated_importance_sampling_cuts_weights_off_and_ignores_masked_tokens():
    masks = [torch.tensor([1.0, 1.0, 1.0]), torch.tensor([0.0, 1.0])]
    train = [torch.tensor([-1.0, -1.0, -5.0]), torch.tensor([-1.0, -2.0])]
    rollout = [torch.tensor([-1.0, -4.0, -1.0]), torch.tensor([-500.0, -2.5])]
    pg_loss = torch.tensor([1.0, -2.0, 4.0, 3.0, 1.0], requires_grad=True)
    args = ObjectiveOptions(tis_clip=2.0, tis_clip_low=0.5)
    loss, same, metrics = truncated_importance_sampling(
        args, pg_loss=pg_loss, train_log_probs=train, rollout_log_probs=rollout, loss_masks=masks, max_seq_lens=None
    )
    weights = [1.0, 2.0, 0.5, 1.0, float(torch.tensor(0.5).exp())]
    assert loss.tolist() == pytest.approx([w * p for w, p in zip(weights, pg_loss.tolist(), strict=True)])
    assert same is masks
    assert metrics["tis_clipfrac"].tolist() == [0, 1, 1, 0, 0]
    assert metrics["tis"].isfinite().all()
    loss.sum().backward()
    assert pg_loss.grad.tolist() == pytest.approx(weights)


@pytest.mark.parametrize("result", ["later()", "(x for x in [])", "endless()"])
def test_a_hook_that_returns_what_it_has_not_run_yet_is_an_error_and_not_a_call_without_effect(result):
    names = {}
    exec("async def later(): ...\nasync def endless(): yield\ndef init(args): return " + result, names)
    hook = bind(REGISTRY["megatron_init"], "mine", names["init"])
    with pytest.raises(HookResultError, match=r"the megatron_init hook mine: it returned a \w+ that never ran"):
        HookCalls(None, {"megatron_init": [hook]}).call_each("megatron_init", None)
    assert (hook.stats.calls, hook.stats.errors) == (1, 1)
