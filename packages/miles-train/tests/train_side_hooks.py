"""Hooks as a user would write them, loaded by path in tests; `CALLS` holds what they were called with."""

from __future__ import annotations

import torch

CALLS = []


def note(name, **what):
    CALLS.append((name, what))


# Losses


def ppo_loss(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy, parallel):
    """Return the built-in policy loss, written out."""
    note("loss", parallel=parallel, columns=sorted(batch))
    current = torch.cat(log_probs_and_entropy(logits)[0])
    ratio = (current - torch.cat(batch["log_probs"])).exp()
    advantages = torch.cat(batch["advantages"])
    high = args.eps_clip if args.eps_clip_high is None else args.eps_clip_high
    plain, clipped = -ratio * advantages, -ratio.clamp(1 - args.eps_clip, 1 + high) * advantages
    loss = sum_of_sample_mean(torch.maximum(plain, clipped))
    return loss, {"pg_clipfrac": sum_of_sample_mean((clipped > plain).float()), "samples": len(batch["tokens"])}


def loss_from_logits(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy, parallel):
    """Return a loss that needs no log-prob: push all logits down."""
    return logits.square().mean() * len(batch["tokens"]), {}


def loss_with_entropy(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy):
    """Ask twice, leave out `parallel`, return a metric of which the largest is kept."""
    log_probs, nothing = log_probs_and_entropy(logits)
    again, entropies = log_probs_and_entropy(logits, entropy=True)
    assert nothing is None
    assert all(torch.equal(a, b) for a, b in zip(log_probs, again, strict=True))
    loss = sum_of_sample_mean(-torch.cat(log_probs) - 0.01 * torch.cat(entropies))
    return loss, {"largest_max": torch.cat(entropies).max(), "entropy": sum_of_sample_mean(torch.cat(entropies))}


# Reducers


def plain_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Return the default reducer, sample by sample."""
    note("pg_loss_reducer", masks=[mask.tolist() for mask in loss_masks], per_token=calculate_per_token_loss)

    def reduce(values):
        total = 0.0 * values.sum()
        for part, mask in zip(values.split(response_lengths), loss_masks, strict=True):
            size = 1.0 if calculate_per_token_loss else max(mask.sum().item(), 1.0)
            total = total + (part * mask).sum() / size
        return total

    return reduce


def constant_reducer(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    """Divide by a constant in place of the response's length, as Dr.GRPO does."""
    return lambda values: (values * torch.cat(loss_masks)).sum() / 10.0


# Importance weights


def sample_by_sample_tis(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks, response_lengths, **_):
    """Return truncated importance sampling, written out."""
    losses, ratios = [], []
    for loss, train, rollout, mask in zip(
        pg_loss.split(response_lengths), train_log_probs, rollout_log_probs, loss_masks, strict=True
    ):
        ratio = torch.exp((train - rollout) * mask)
        losses.append(loss * ratio.clamp(args.tis_clip_low, args.tis_clip))
        ratios.append(ratio)
    return torch.cat(losses), loss_masks, {"my_ratio": torch.cat(ratios), "my_ratio_max": torch.cat(ratios)}


def drop_likely_tokens(args, *, pg_loss, train_log_probs, rollout_log_probs, loss_masks):
    """Reject tokens that the trainer finds more likely than the engine did; also in place."""
    for mask, train, rollout in zip(loss_masks, train_log_probs, rollout_log_probs, strict=True):
        mask[train > rollout] = 0
    return pg_loss, loss_masks, {"kept": torch.cat(loss_masks)}


# Columns


def advantage_from_log_probs(args, rollout_data):
    """Weight rewards by how unlikely a token was; a double tensor, to be made fp32."""
    note("advantage", columns=sorted(rollout_data))
    for column in ("advantages", "returns"):
        rollout_data[column] = [
            (reward * (0.0 if index % 4 == 0 else 1.0) * (1 - log_probs.exp())).double()
            for reward, index, log_probs in zip(
                rollout_data["rewards"], rollout_data["sample_indices"], rollout_data["log_probs"], strict=True
            )
        ]


def mask_first_token(args, rollout_id, rollout_data):
    """Mask the first response token of each sample, and all of every fifth sample, in place."""
    shown = {name: rollout_data[name][0] for name in ("loss_masks", "advantages", "log_probs") if name in rollout_data}
    note("rollout_data_postprocess", rollout_id=rollout_id, columns=sorted(rollout_data), **shown)
    for index, mask in zip(rollout_data["sample_indices"], rollout_data["loss_masks"], strict=True):
        mask[: len(mask) if index % 5 == 0 else 1] = 0


KNOWN = {"tokens", "response_lengths", "total_lengths", "loss_masks", "rewards", "sample_indices", "rollout_log_probs"}
KNOWN |= {"log_probs", "advantages", "returns"}


def forget_the_unknown(args, rollout_id, rollout_data):
    """Drop every column that this hook has never heard of."""
    note("rollout_data_postprocess", columns=sorted(rollout_data))
    for name in set(rollout_data) - KNOWN:
        del rollout_data[name]


def advantage_and_nothing_unknown(args, rollout_data):
    """Weight rewards by how unlikely a token was, and drop every column that this hook has never heard of."""
    advantage_from_log_probs(args, rollout_data)
    forget_the_unknown(args, 0, rollout_data)


# Moments


def half_rate(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    note("before_train_step", where=(rollout_id, step_id), kinds=[type(o).__name__ for o in (model, optimizer)])
    for group in optimizer.param_groups:
        group["lr"] = opt_param_scheduler.max_lr / 2


def note_step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    note("second before_train_step", where=(rollout_id, step_id), rate=optimizer.param_groups[0]["lr"])


def note_init(args):
    from megatron.core import parallel_state

    note("megatron_init", ready=parallel_state.model_parallel_is_initialized(), loss_type=args.loss_type)


def note_log_prob(args, model, store_prefix):
    note("before_log_prob", prefix=store_prefix, chunks=len(model))


def note_save(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    note("post_save", what=(rollout_id, checkpoint_dir, hf_checkpoint_dir))


class FrozenEmbedding:
    """A provider that is a class: it freezes the embedding and halves the logits."""

    def __init__(self, args):
        self.closed = False

    def __call__(self, **keywords):
        from miles_train.megatron.model import gpt_model

        note("model_provider", **{name: type(value).__name__ for name, value in keywords.items()})
        model = gpt_model(**keywords)
        if model.pre_process or model.post_process:
            # Both ends of a pipeline hold the tied weight.
            model.shared_embedding_or_output_weight().requires_grad_(False)
        if model.post_process:
            model.output_layer.register_forward_hook(lambda _, __, output: (output[0] / 2, output[1]))
        return model

    def close(self):
        note("closed", before=self.closed)
        self.closed = True


def extra_parameter(*, config, **keywords):
    from miles_train.megatron.model import gpt_model

    model = gpt_model(config=config, **keywords)
    model.gate = torch.nn.Parameter(torch.zeros(1))
    return model


# Hooks that do what they may not


def no_model(**keywords):
    return torch.nn.Linear(1, 1)


def raises(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    raise ZeroDivisionError("the hook's own")


def loss_is_nan(args, batch, logits, sum_of_sample_mean, *, log_probs_and_entropy):
    return torch.cat(log_probs_and_entropy(logits)[0]).sum() * float("nan"), {}


def loss_is_detached(args, batch, logits, sum_of_sample_mean):
    return logits.detach().sum(), {}


def loss_is_a_vector(args, batch, logits, sum_of_sample_mean):
    return logits[0], {}


def loss_alone(args, batch, logits, sum_of_sample_mean):
    return logits.sum()


def loss_with_a_tensor_metric(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {"mine": logits[0]}


def loss_with_our_metric(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {"lr": 1.0}


def loss_with_a_reserved_metric(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {"zero_step_0_rate_max": 1.0}


def reducer_of_nothing(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return None


def reducer_to_a_vector(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values


def weights_with_nan(args, *, pg_loss, loss_masks):
    bad = torch.ones_like(pg_loss)
    bad[3] = float("nan")
    return pg_loss * bad, loss_masks, {}


def weights_without_gradient(args, *, pg_loss, loss_masks):
    return pg_loss.detach(), loss_masks, {}


def weights_with_short_masks(args, *, pg_loss, loss_masks):
    return pg_loss, [mask[1:] for mask in loss_masks], {}


def weights_with_a_scalar_metric(args, *, pg_loss, loss_masks):
    return pg_loss, loss_masks, {"mine": pg_loss.detach().mean()}


def weights_alone(args, *, pg_loss):
    return pg_loss


def no_returns(args, rollout_data):
    rollout_data["advantages"] = [torch.ones_like(mask) for mask in rollout_data["loss_masks"]]


def infinite_advantage(args, rollout_data):
    no_returns(args, rollout_data)
    rollout_data["returns"] = list(rollout_data["advantages"])
    rollout_data["advantages"][1] = rollout_data["advantages"][1] / 0


def advantages_without_masks(args, rollout_data):
    no_returns(args, rollout_data)
    rollout_data["returns"] = list(rollout_data["advantages"])
    del rollout_data["loss_masks"]


def advantages_and_other_tokens(args, rollout_data):
    no_returns(args, rollout_data)
    rollout_data["returns"] = list(rollout_data["advantages"])
    rollout_data["tokens"][0][0] += 1


def long_advantage(args, rollout_data):
    no_returns(args, rollout_data)
    rollout_data["advantages"][2] = torch.ones(99)


def changes_tokens(args, rollout_id, rollout_data):
    rollout_data["tokens"][0][0] += 1


def changes_lengths(args, rollout_id, rollout_data):
    rollout_data["response_lengths"][0] += 1


def drops_a_mask(args, rollout_id, rollout_data):
    rollout_data["loss_masks"].pop()


def infinite_mask(args, rollout_id, rollout_data):
    rollout_data["loss_masks"] = [mask.log() for mask in rollout_data["loss_masks"]]


def takes_our_column(args, rollout_id, rollout_data):
    rollout_data["rollout_mask_sums"] = [1] * len(rollout_data["tokens"])


def short_column(args, rollout_id, rollout_data):
    rollout_data["mine"] = [1]
