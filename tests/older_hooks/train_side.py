"""Hooks of the trainer's ranks as they are written for Miles 0.x and slime: one of each kind."""

from argparse import Namespace
from collections.abc import Callable

import torch
from miles.backends.training_utils.cp_utils import get_sum_of_sample_mean
from miles.backends.training_utils.loss import get_log_probs_and_entropy
from miles.backends.training_utils.parallel import ParallelState, get_parallel_state
from slime.backends.megatron_utils.cp_utils import all_gather_with_cp, slice_log_prob_with_cp
from slime.backends.megatron_utils.loss import get_log_probs_and_entropy as slimes_log_probs
from slime.utils.ppo_utils import compute_approx_kl, compute_policy_loss
from slime.utils.types import RolloutBatch


def mask_unlikely(args):
    args.called = True


def advantage(args, rollout_data):
    rollout_data["advantages"] = rollout_data["returns"] = [torch.zeros(n) for n in rollout_data["response_lengths"]]


def miles_loss(
    args: Namespace,
    parallel_state: ParallelState,
    batch: RolloutBatch,
    logits: torch.Tensor,
    sum_of_sample_mean: Callable[[torch.Tensor], torch.Tensor],
):
    assert get_parallel_state() is parallel_state
    found = get_log_probs_and_entropy(
        logits, args=args, parallel_state=parallel_state, unconcat_tokens=batch["unconcat_tokens"],
        total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"], with_entropy=True,
        max_seq_lens=batch.get("max_seq_lens"),
    )  # fmt: skip
    loss = -sum_of_sample_mean(torch.cat(found["log_probs"])) - 0.1 * sum_of_sample_mean(torch.cat(found["entropy"]))
    return loss, {"loss": loss.detach()}


def slime_loss(args, batch, logits, sum_of_sample_mean):
    _, found = slimes_log_probs(
        logits, args=args, unconcat_tokens=batch["unconcat_tokens"], total_lengths=batch["total_lengths"],
        response_lengths=batch["response_lengths"], with_entropy=True,
    )  # fmt: skip
    log_probs, old = torch.cat(found["log_probs"]), torch.cat(batch["log_probs"])
    pg_loss, clipfrac = compute_policy_loss(old - log_probs, torch.cat(batch["advantages"]), 0.2, 0.28)
    kl = compute_approx_kl(log_probs, old, kl_loss_type="low_var_kl")
    loss = sum_of_sample_mean(pg_loss) + 0.01 * sum_of_sample_mean(kl)
    return loss, {"loss": loss.detach(), "clipfrac": sum_of_sample_mean(clipfrac)}


def weights(
    args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **kwargs
):
    old = [all_gather_with_cp(*one) for one in zip(train_log_probs, total_lengths, response_lengths, strict=True)]
    ratios = [(a - b).exp().clamp(max=2.0) for a, b in zip(old, rollout_log_probs, strict=True)]
    mine = [slice_log_prob_with_cp(r, t, n) for r, t, n in zip(ratios, total_lengths, response_lengths, strict=True)]
    flat = torch.cat(mine)
    return pg_loss * flat, loss_masks, {"ratio": flat.detach()}


def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return get_sum_of_sample_mean(total_lengths, response_lengths, loss_masks, calculate_per_token_loss)


def init(args): ...


def before_log_prob(args, model, store_prefix): ...


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler): ...


def post_save(args, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None): ...


def model_provider(pre_process=True, post_process=True, vp_stage=None):
    return ("model", pre_process, post_process, vp_stage)
