"""Our own objective passes the kit that we hand to authors of train-side hooks."""

import pytest
import torch

from miles_api.options import options_from
from miles_api.testing import ConformanceError, check_hook
from miles_train.advantages import set_advantages
from miles_train.estimators import ESTIMATORS
from miles_train.importance import truncated_importance_sampling
from miles_train.loss import policy_loss, sft_loss
from miles_train.options import ObjectiveOptions
from miles_train.reducers import sum_of_sample_mean


def as_hook(built_in):
    """Return a built-in loss with the signature of the `loss` hook: `args` in the place of its own options."""

    def loss(args, batch, logits, reduce, *, log_probs_and_entropy):
        objective = options_from(args, ObjectiveOptions)
        return built_in(objective, batch, logits, reduce, log_probs_and_entropy=log_probs_and_entropy)

    return loss


@pytest.mark.parametrize("built_in", [policy_loss, sft_loss])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_built_in_losses_pass_the_kit(built_in, per_token):
    options = {"calculate_per_token_loss": per_token, "entropy_coef": 0.01}
    assert len(check_hook("loss", as_hook(built_in), **options).passed) == 3


def test_the_default_reducer_passes_the_kit():
    assert len(check_hook("pg_loss_reducer", sum_of_sample_mean).passed) == 6


@pytest.mark.parametrize("clips", [{}, {"tis_clip": 1.0, "tis_clip_low": 0.5}])
def test_truncated_importance_sampling_passes_the_kit(clips):
    assert check_hook("importance_weights", truncated_importance_sampling, **clips).passed


def test_the_default_advantages_pass_the_kit():
    def advantage(args, rollout_data):
        set_advantages(rollout_data, ESTIMATORS["grpo"], ObjectiveOptions())

    assert check_hook("advantage", advantage).passed


def test_a_model_provider_is_told_that_stand_ins_are_no_megatron():
    # The kit has no process groups: what it can say of the default provider is that it fits the stub.
    with pytest.raises(ConformanceError):
        check_hook("model_provider", "miles_train.megatron.model:gpt_model")


def test_the_kits_own_log_probs_and_reducer_are_those_of_the_trainer():
    from miles_api.testing import tensors
    from miles_train.log_probs import log_probs_and_entropy

    batch = tensors.rollout_data(torch)
    logits = tensors.logits_of(torch, batch)
    ours = log_probs_and_entropy(logits, batch["tokens"], batch["response_lengths"], 0.7, entropy=True)
    theirs = tensors.log_probs_of(torch, batch, 0.7)(logits, entropy=True)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(torch.cat(one), torch.cat(other))
    for per_token in (False, True):
        values = torch.cat(batch["log_probs"])
        default = sum_of_sample_mean(
            batch["total_lengths"], batch["response_lengths"], batch["loss_masks"], per_token
        )  # fmt: skip
        torch.testing.assert_close(default(values), tensors.reducer(torch, batch, per_token)(values))
