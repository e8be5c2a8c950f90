"""Do the objective's hooks give finite numbers of the right shape, gradient included? They need torch."""

# ruff: noqa: N803, N806  the shape suffixes: R response tokens of the micro-batch, T packed tokens, V vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.testing.case import case
from miles_api.testing.tensors import clone, log_probs_of, logits_of, parallel, reducer, rollout_data, the_torch

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_BATCHES = (("", None), (" of a single sample", [0]), (" with nothing unmasked", [1]))
_ONE_RANK = "several ranks: tensor, context and data parallelism"


@case("advantage", left_out=_ONE_RANK)
def _advantage(trial: Trial) -> None:
    torch = the_torch(trial)
    for of, keep in _BATCHES:
        with trial.check(f"sets advantages and returns{of}"):
            data = rollout_data(torch, keep)
            del data["advantages"], data["returns"]
            before = clone(torch, data)
            trial.call(trial.args, data)
            for field in ("advantages", "returns"):
                _require_per_sample(trial, torch, field, data)
            for name in ("tokens", "rewards", "response_lengths", "sample_indices"):
                same = _same(torch, before[name], data[name])
                trial.require(same, "changed a column that is not its own", field=name)


def _same(torch: Any, before: list[Any], now: Any) -> bool:
    if not isinstance(now, list) or len(now) != len(before):
        return False
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(before, now, strict=True))


def _require_per_sample(trial: Trial, torch: Any, field: str, data: dict[str, Any]) -> None:
    """Fail unless a column has one finite 1-D tensor of response length for each sample."""
    column, lengths = data.get(field), data["response_lengths"]
    listed = isinstance(column, list | tuple) and len(column) == len(lengths)
    trial.require(listed, f"is not a list of one tensor for each of {len(lengths)} samples", field=field)
    for index, values, length in zip(data["sample_indices"], column or (), lengths, strict=True):
        fits = isinstance(values, torch.Tensor) and tuple(values.shape) == (length,)
        shown = tuple(values.shape) if isinstance(values, torch.Tensor) else type(values).__name__
        trial.require(fits, f"sample {index} needs a 1-D tensor of {length} response tokens, not {shown}", field=field)
        trial.require(bool(values.isfinite().all()), f"sample {index} has NaN or infinity", field=field)


@case("loss", left_out=_ONE_RANK)
def _loss(trial: Trial) -> None:
    torch = the_torch(trial)
    for of, keep in _BATCHES:
        with trial.check(f"gives a loss with a gradient for a micro-batch{of}"):
            batch = rollout_data(torch, keep)
            leaf_TV = logits_of(torch, batch)
            found = trial.call(
                trial.args, batch, leaf_TV.clone(), reducer(torch, batch, trial.args.calculate_per_token_loss),
                log_probs_and_entropy=log_probs_of(torch, batch, trial.args.rollout_temperature), parallel=parallel(),
            )  # fmt: skip
            _require_pair(trial, found, 2, "(loss, metrics)")
            loss, metrics = found
            _require_scalar(trial, torch, loss, "the loss")
            _require_gradient(trial, loss, leaf_TV, "logits")
            trial.require(isinstance(metrics, dict), f"gave metrics as a {type(metrics).__name__}, not a dict by name")
            for name, value in metrics.items():
                trial.number(value, f"the metric {name}")


@case("importance_weights", left_out=_ONE_RANK)
def _importance_weights(trial: Trial) -> None:
    torch = the_torch(trial)
    for of, keep in _BATCHES:
        with trial.check(f"weights the loss of a micro-batch{of}"):
            batch = rollout_data(torch, keep)
            leaf_R = torch.linspace(-1.0, 1.0, sum(batch["response_lengths"])).requires_grad_()
            found = trial.call(
                args=trial.args, pg_loss=leaf_R.clone(), train_log_probs=batch["log_probs"],
                rollout_log_probs=batch["rollout_log_probs"], loss_masks=[mask.clone() for mask in batch["loss_masks"]],
                total_lengths=batch["total_lengths"], response_lengths=batch["response_lengths"],
                parallel_state=parallel(), max_seq_lens=None,
            )  # fmt: skip
            _require_pair(trial, found, 3, "(pg_loss, loss_masks, metrics)")
            pg_loss_R, masks, metrics = found
            _require_per_token(trial, torch, pg_loss_R, leaf_R, "pg_loss")
            _require_gradient(trial, pg_loss_R.sum(), leaf_R, "pg_loss")
            _require_per_sample(trial, torch, "loss_masks", {**batch, "loss_masks": masks})
            trial.require(isinstance(metrics, dict), f"gave metrics as a {type(metrics).__name__}, not a dict by name")
            for name, values in metrics.items():
                _require_per_token(trial, torch, values, leaf_R, f"metrics[{name!r}]")


@case("pg_loss_reducer", left_out=_ONE_RANK)
def _pg_loss_reducer(trial: Trial) -> None:
    torch = the_torch(trial)
    for per_token in (False, True):
        for of, keep in _BATCHES:
            each = "tokens" if per_token else "samples"
            with trial.check(f"reduces {each} of a micro-batch{of} to one number, masked tokens left out"):
                batch = rollout_data(torch, keep)
                leaf_R = torch.linspace(-1.0, 1.0, sum(batch["response_lengths"])).requires_grad_()
                masks = batch["loss_masks"]
                reduce = trial.call(batch["total_lengths"], batch["response_lengths"], masks, per_token)
                trial.require(callable(reduce), f"returned a {type(reduce).__name__}, not a function of token values")
                value = trial.guarded(lambda reduce=reduce, leaf_R=leaf_R: reduce(leaf_R.clone()))
                _require_scalar(trial, torch, value, "the reduced loss")
                _require_gradient(trial, value, leaf_R, "token values")
                pulled = (leaf_R.grad != 0) & (torch.cat(masks) == 0)
                trial.require(not pulled.any(), "a masked token moves the result: multiply by its loss mask")


def _require_pair(trial: Trial, found: Any, size: int, form: str) -> None:
    fits = isinstance(found, tuple | list) and len(found) == size
    trial.require(fits, f"returned a {type(found).__name__}, not {form}")


def _require_scalar(trial: Trial, torch: Any, value: Any, what: str) -> None:
    fits = isinstance(value, torch.Tensor) and value.numel() == 1
    trial.require(fits, f"returned {type(value).__name__} as {what}, not a scalar tensor")
    trial.require(bool(value.isfinite().all()), f"{what} is NaN or infinite")


def _require_per_token(trial: Trial, torch: Any, values_R: Any, like_R: Any, field: str) -> None:
    fits = isinstance(values_R, torch.Tensor) and values_R.shape == like_R.shape
    shown = tuple(values_R.shape) if isinstance(values_R, torch.Tensor) else type(values_R).__name__
    trial.require(fits, f"is {shown}, not a 1-D tensor of all {len(like_R)} response tokens", field=field)
    trial.require(bool(values_R.isfinite().all()), "has NaN or infinity", field=field)


def _require_gradient(trial: Trial, value: Any, leaf: Any, to: str) -> None:
    """Run the backward pass; fail where no finite gradient reaches `leaf`."""
    trial.require(value.requires_grad, f"has no gradient to {to}: was it detached?")
    trial.guarded(value.reshape(()).backward)
    reached = leaf.grad is not None and bool(leaf.grad.isfinite().all())
    trial.require(reached, f"its gradient to {to} is missing or not finite")
