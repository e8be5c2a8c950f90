"""Train-side hooks that break numbers, gradients or columns are found."""

import sys

import pytest

from miles_api.testing import ConformanceError, ConformanceSkip
from miles_api.testing import check_hook as check


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


def test_without_torch_hooks_of_the_trainer_are_skipped_and_say_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ConformanceSkip, match="torch is not installed"):
        check("advantage", lambda args, rollout_data: None)


def sets_advantages_alone(args, rollout_data):
    rollout_data["advantages"] = list(rollout_data["loss_masks"])


def one_number_a_sample(args, rollout_data):
    rollout_data["advantages"] = rollout_data["returns"] = list(rollout_data["rewards"])


def standardises(args, rollout_data):
    rollout_data["advantages"] = [mask / mask.sum() for mask in rollout_data["loss_masks"]]
    rollout_data["returns"] = rollout_data["advantages"]


def infinite_returns(args, rollout_data):
    rollout_data["advantages"] = list(rollout_data["loss_masks"])
    rollout_data["returns"] = [mask / 0 for mask in rollout_data["loss_masks"]]


def scales_rewards(args, rollout_data):
    rollout_data["rewards"] = [reward * 2 for reward in rollout_data["rewards"]]
    rollout_data["advantages"] = rollout_data["returns"] = list(rollout_data["loss_masks"])


def returns_the_columns(args, rollout_id, rollout_data):
    return rollout_data


def drops_a_column(args, rollout_id, rollout_data):
    del rollout_data["weight_versions"]


def adds_a_short_column(args, rollout_id, rollout_data):
    rollout_data["mine"] = [1]


def pads_tokens(args, rollout_id, rollout_data):
    rollout_data["tokens"] = [tokens * 0 for tokens in rollout_data["tokens"]]


def infinite_masks(args, rollout_id, rollout_data):
    rollout_data["loss_masks"] = [mask.log() for mask in rollout_data["loss_masks"]]


def cuts_a_response(args, rollout_id, rollout_data):
    rollout_data["response_lengths"][0] -= 1


def drops_masked(args, rollout_id, rollout_data):
    rollout_data["loss_masks"] = [mask[mask > 0] for mask in rollout_data["loss_masks"]]


def detached_loss(args, batch, logits, sum_of_sample_mean):
    return logits.detach().sum(), {}


def loss_a_token(args, batch, logits, sum_of_sample_mean):
    return logits[0], {}


def loss_alone(args, batch, logits, sum_of_sample_mean):
    return logits.sum()


def metrics_in_a_list(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), [1.0]


def metric_of_nan(args, batch, logits, sum_of_sample_mean):
    return logits.sum(), {"mine": float("nan")}


def loss_with_a_broken_gradient(args, batch, logits, sum_of_sample_mean):
    return (logits * 0).sqrt().sum(), {}


def loss_of_something_else(args, batch, logits, sum_of_sample_mean):
    return logits.new_ones(()).requires_grad_() * 2, {}


def loss_of_a_mean(args, batch, logits, sum_of_sample_mean):
    return logits.sum() * sum(batch["raw_reward"]) / sum(batch["raw_reward"]), {}


def weights_without_masks(args, *, pg_loss):
    return pg_loss, {}


def one_metric(args, *, pg_loss, loss_masks):
    return pg_loss, loss_masks, {"mean": pg_loss.detach().mean()}


def detached_weights(args, *, pg_loss, loss_masks):
    return pg_loss.detach(), loss_masks, {}


def weights_a_sample(args, *, pg_loss, loss_masks):
    return pg_loss[:1], loss_masks, {}


def weights_with_nan(args, *, pg_loss, loss_masks):
    return pg_loss * float("nan"), loss_masks, {}


def masks_in_one_tensor(args, *, pg_loss, loss_masks):
    return pg_loss, pg_loss, {}


def metrics_as_text(args, *, pg_loss, loss_masks):
    return pg_loss, loss_masks, "none"


def reduces_at_once(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return loss_masks[0].sum()


def reduces_without_gradient(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values.detach().sum() * 0.0


def ignores_masks(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    return lambda values: values.sum()


def divides_by_the_mask(total_lengths, response_lengths, loss_masks, calculate_per_token_loss=False):
    def reduce(values):
        parts = zip(values.split(response_lengths), loss_masks, strict=True)
        return sum((part * mask).sum() / mask.sum() for part, mask in parts)

    return reduce


def breaks_a_weight(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    next(model[0].parameters()).data.fill_(float("nan"))


def breaks_for_the_reference(args, model, store_prefix):
    if store_prefix == "ref_":
        next(model[0].parameters()).data.fill_(float("inf"))


def no_rate(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    optimizer.param_groups[0]["lr"] = None


def moves_the_checkpoint(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    import shutil

    shutil.move(checkpoint_dir, f"{checkpoint_dir}-moved")


@pytest.mark.parametrize(
    ("name", "fn", "problem", "field"),
    [
        ("advantage", sets_advantages_alone, "is not a list of one tensor", "returns"),
        ("advantage", one_number_a_sample, "needs a 1-D tensor of 4 response tokens, not float", "advantages"),
        ("advantage", standardises, "sample 1 has NaN or infinity", "advantages"),
        ("advantage", infinite_returns, "has NaN or infinity", "returns"),
        ("advantage", scales_rewards, "changed a column that is not its own", "rewards"),
        ("rollout_data_postprocess", returns_the_columns, "what it returns is not used", None),
        ("rollout_data_postprocess", drops_a_column, "is gone", "weight_versions"),
        ("rollout_data_postprocess", adds_a_short_column, "has no entry for each of 5 samples", "mine"),
        ("rollout_data_postprocess", pads_tokens, "may not change here", "tokens"),
        ("rollout_data_postprocess", infinite_masks, "has NaN or infinity", "loss_masks"),
        ("loss", loss_alone, "not (loss, metrics)", None),
        ("loss", metrics_in_a_list, "gave metrics as a list", None),
        ("loss", metric_of_nan, "returned nan as the metric mine", "the metric mine"),
        ("loss", loss_with_a_broken_gradient, "is missing or not finite", None),
        ("loss", loss_of_something_else, "is missing or not finite", None),
        ("importance_weights", weights_a_sample, "is (1,), not a 1-D tensor of all 13", "pg_loss"),
        ("importance_weights", weights_with_nan, "has NaN or infinity", "pg_loss"),
        ("importance_weights", masks_in_one_tensor, "is not a list of one tensor", "loss_masks"),
        ("importance_weights", metrics_as_text, "gave metrics as a str", None),
        ("pg_loss_reducer", reduces_without_gradient, "has no gradient to token values", None),
        ("pg_loss_reducer", reduces_at_once, "not a function of token values", None),
        ("before_log_prob", breaks_for_the_reference, "has NaN or infinity", "0.weight"),
        ("before_train_step", no_rate, "not a finite number", "learning rate"),
        ("rollout_data_postprocess", cuts_a_response, "may not change here", "response_lengths"),
        ("rollout_data_postprocess", drops_masked, "no longer has a 1-D tensor of 2", "loss_masks"),
        ("loss", detached_loss, "has no gradient to logits", None),
        ("loss", loss_a_token, "not a scalar tensor", None),
        ("loss", loss_of_a_mean, "the loss is NaN", None),
        ("importance_weights", weights_without_masks, "not (pg_loss, loss_masks, metrics)", None),
        ("importance_weights", one_metric, "not a 1-D tensor of all 13 response tokens", "metrics['mean']"),
        ("importance_weights", detached_weights, "has no gradient to pg_loss", None),
        ("pg_loss_reducer", ignores_masks, "a masked token moves the result", None),
        ("pg_loss_reducer", divides_by_the_mask, "the reduced loss is NaN", None),
        ("before_train_step", breaks_a_weight, "has NaN or infinity", "0.weight"),
        ("post_save", moves_the_checkpoint, "changed or removed weights.bin", None),
        ("model_provider", lambda *, config: config, "returned a SimpleNamespace, not a torch module", None),
    ],
)
def test_a_hook_of_the_trainer_that_breaks_numbers_or_columns_is_found(name, fn, problem, field):
    pytest.importorskip("torch")
    error = refused(name, fn)
    assert problem in str(error)
    assert error.field == field


def test_a_model_provider_is_called_by_keyword_with_stand_ins():
    torch = pytest.importorskip("torch")
    assert (
        len(check("model_provider", lambda *, hf_config, **_: torch.nn.Linear(1, hf_config["vocab_size"])).passed) == 3
    )
