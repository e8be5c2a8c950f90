"""Every hook of a trainer rank: each notes what it saw, and changes something that can be measured."""

import torch
from notes import kinds, saw

from miles_train.megatron.model import gpt_model


def megatron_init(args):
    saw("megatron_init", world=torch.distributed.get_world_size())


def model_provider(pre_process, post_process, vp_stage=None, *, config, hf_config, pg_collection, args):
    """The default model, with a final norm that never trains."""
    model = gpt_model(
        pre_process, post_process, vp_stage, config=config, hf_config=hf_config, pg_collection=pg_collection
    )
    model.decoder.final_layernorm.weight.requires_grad_(False)
    saw("model_provider", layers=config.num_layers, hidden=hf_config["hidden_size"], seed=args.seed)
    return model


def before_log_prob(args, model, store_prefix):
    saw("before_log_prob", prefix=store_prefix, chunks=len(model))


def before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    saw("before_train_step", rollout_id=rollout_id, step_id=step_id, groups=len(optimizer.param_groups))


def second_before_train_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    saw("before_train_step_second", step_id=step_id)


def post_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    from pathlib import Path

    names = sorted(path.name for path in Path(checkpoint_dir).iterdir())
    saw("post_save", rollout_id=rollout_id, names=names, hf=bool(list(Path(hf_checkpoint_dir).glob("*.safetensors"))))


def advantage(args, rollout_data):
    """Every token of a sample gets its post-processed reward, which here is 2 or more."""
    masks = rollout_data["loss_masks"]
    saw("advantage", log_probs=kinds(rollout_data["log_probs"]), rewards=rollout_data["rewards"])
    rollout_data["advantages"] = [
        torch.full_like(mask, value) for mask, value in zip(masks, rollout_data["rewards"], strict=True)
    ]
    rollout_data["returns"] = rollout_data["advantages"]


def postprocess(args, rollout_id, rollout_data):
    """Takes the first token of every response out of the loss."""
    saw(
        "rollout_data_postprocess",
        kinds={name: kinds(rollout_data[name]) for name in ("tokens", "loss_masks", "log_probs", "advantages")},
        whole=[len(m) == n for m, n in zip(rollout_data["loss_masks"], rollout_data["response_lengths"], strict=True)],
        mine=rollout_data["mine"],
        masks=[float(mask.sum()) for mask in rollout_data["loss_masks"]],
    )
    for mask in rollout_data["loss_masks"]:
        mask[:1] = 0.0


def importance_weights(
    args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, total_lengths, response_lengths, **rest
):
    """Halves the loss."""
    saw(
        "importance_weights",
        pg_loss=list(pg_loss.shape), lengths=response_lengths, masks=[float(mask.sum()) for mask in loss_masks],
        gap=max(float((a - b).abs().max()) for a, b in zip(train_log_probs, rollout_log_probs, strict=True)),
        advantage_is_whole=bool(pg_loss.abs().max() >= 2.0), rest=sorted(rest),
    )  # fmt: skip
    return 0.5 * pg_loss, loss_masks, {"mine": torch.full_like(pg_loss, 3.0).detach()}


def reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Divides by a constant, whatever a response's length (Dr.GRPO)."""
    saw("pg_loss_reducer", samples=len(loss_masks), per_token=calculate_per_token_loss)
    mask = torch.cat(loss_masks)
    return lambda values: (values * mask).sum() / 8.0


def loss(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy, parallel):
    """REINFORCE."""
    log_probs, entropy = log_probs_and_entropy(logits, entropy=True)
    value = -sum_of_sample_mean(torch.cat(log_probs) * torch.cat(batch["advantages"]))
    saw("loss", logits=logits.dim(), columns=sorted(batch), loss=float(value), dp=parallel.dp.size)
    return value, {"mine": sum_of_sample_mean(torch.cat(entropy)).detach()}
