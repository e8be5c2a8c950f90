"""Each train-side hook that computes something: called as its stub says, its result made fit to compute with."""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, T packed tokens, V (local) vocabulary, R response tokens of the micro-batch

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_train.columns import COMPUTED_COLUMNS, PER_RESPONSE_TOKEN
from miles_train.guards import check_finite
from miles_train.hook_results import OUR_METRICS, POLICY_METRICS, ResultCheck
from miles_train.importance import truncated_importance_sampling
from miles_train.siblings import MASK_SUMS

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from miles_api.loading.bind import BoundHook
    from miles_train.train_hooks import HookCalls

__all__ = ["call_advantage", "call_importance_weights", "call_loss", "call_pg_loss_reducer", "call_postprocess"]

_FIXED = ("response_lengths", "total_lengths", "sample_indices")


class _Before:
    """The columns as they were before a hook that may change them in place."""

    def __init__(self, check: ResultCheck, rollout_data: dict[str, Any]) -> None:
        self._check = check
        self._data = rollout_data
        self._fixed = {name: list(rollout_data[name]) for name in _FIXED}
        self._tokens_T = torch.cat(rollout_data["tokens"])
        self._token_columns = [name for name in (*PER_RESPONSE_TOKEN, *COMPUTED_COLUMNS) if name in rollout_data]

    def require_whole(self) -> None:
        """Raise `HookResultError` for a column that is gone, may not change, or no longer fits its samples."""
        check, data = self._check, self._data
        for name, before in self._fixed.items():
            if data.get(name) != before:
                raise check.wrong(f"{name!r} may not change here; rewrite samples in the convert_samples hook")
        lengths = [len(tokens) for tokens in data.get("tokens", ())]
        if lengths != self._fixed["total_lengths"] or not torch.equal(torch.cat(data["tokens"]), self._tokens_T):
            raise check.wrong("'tokens' may not change here; rewrite samples in the convert_samples hook")
        for name in self._token_columns:
            data[name] = check.per_sample(name, data.get(name))
        check.column_names(data, MASK_SUMS)
        for name, column in data.items():
            if not isinstance(column, list | tuple) or len(column) != len(lengths):
                raise check.wrong(f"column {name!r} must be a list with one entry for each of {len(lengths)} samples")


def call_advantage(hooks: HookCalls, hook: BoundHook, rollout_data: dict[str, Any]) -> None:
    """Let the `advantage` hook set `advantages` and `returns`.

    Raises:
        HookResultError: one is missing, of another length than the response, or not finite; or what was there before
            is not whole any more, as in `call_postprocess`.
    """
    check = ResultCheck(hooks, hook, rollout_data)
    before = _Before(check, rollout_data)
    hooks.call(hook, hooks.args, rollout_data)
    for field in ("advantages", "returns"):
        rollout_data[field] = check.per_sample(field, rollout_data.get(field))
    before.require_whole()


def call_postprocess(hooks: HookCalls, rollout_id: int, rollout_data: dict[str, Any]) -> None:
    """Let each `rollout_data_postprocess` hook change the columns in place, and look at them after each.

    Raises:
        HookResultError: tokens, lengths or sample indices changed, a token column is gone or no longer fits its
            response, another column has the name of one that the trainer computes, or no longer has one entry a
            sample.
    """
    for hook in hooks.many("rollout_data_postprocess"):
        before = _Before(ResultCheck(hooks, hook, rollout_data), rollout_data)
        hooks.call(hook, hooks.args, rollout_id, rollout_data)
        before.require_whole()


def call_importance_weights(
    hooks: HookCalls, batch: dict[str, Any], pg_loss_R: Tensor, train_log_probs: Sequence[Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the corrected policy loss of each token, and the metrics of each token.

    The hook, or without one truncated importance sampling, gets copies of the masks. What it takes out of them is
    taken out of the loss here, so that a reducer built from the batch's own masks keeps its denominators.

    Raises:
        HookResultError: the loss, a mask or a metric does not fit the response tokens or is not finite, or the loss
            has lost its gradient.
    """
    keywords: dict[str, Any] = {
        "pg_loss": pg_loss_R,
        "train_log_probs": list(train_log_probs),
        "rollout_log_probs": list(batch["rollout_log_probs"]),
        "loss_masks": [mask.clone() for mask in batch["loss_masks"]],
        "total_lengths": list(batch["total_lengths"]),
        "response_lengths": list(batch["response_lengths"]),
        "parallel_state": hooks.parallel,
        # Samples are packed, never padded to a common length.
        "max_seq_lens": None,
    }
    hook = hooks.one("importance_weights")
    if hook is None:
        loss_R, _, metrics = truncated_importance_sampling(hooks.args, **keywords)
        return loss_R, metrics
    check = ResultCheck(hooks, hook, batch)
    result = hooks.call(hook, args=hooks.args, **keywords)
    if not isinstance(result, tuple) or len(result) != len(("pg_loss", "loss_masks", "metrics")):
        raise check.wrong("it must return (pg_loss, loss_masks, metrics)")
    loss_R = check.per_token("'pg_loss'", result[0])
    if pg_loss_R.requires_grad and len(pg_loss_R) and not loss_R.requires_grad:
        raise check.wrong("the returned 'pg_loss' has no gradient: multiply the given one by detached weights")
    if not bool(torch.isfinite(loss_R).all()):
        # A model that is broken already is not the hook's doing.
        lengths, indices = batch["response_lengths"], batch["sample_indices"]
        check_finite("log_probs", torch.cat(list(train_log_probs)), lengths, indices, hooks.where)
        check_finite("pg_loss", pg_loss_R.detach(), lengths, indices, hooks.where)
        check.finite("pg_loss", loss_R)
    given_R = torch.cat(batch["loss_masks"])
    returned_R = torch.cat(check.per_sample("loss_masks", result[1]))
    kept_R = torch.where(given_R != 0, returned_R / torch.where(given_R != 0, given_R, 1.0), 0.0)
    named = check.names(result[2], OUR_METRICS | POLICY_METRICS)
    metrics = {name: check.per_token(f"the metric {name!r}", value).detach() for name, value in named.items()}
    return loss_R * kept_R, metrics


def call_pg_loss_reducer(hooks: HookCalls, batch: dict[str, Any], per_token: bool) -> Callable[[Tensor], Tensor]:
    """Return the `pg_loss_reducer` hook's reducer of this micro-batch; what it returns is checked to be a scalar."""
    hook = hooks.one("pg_loss_reducer")
    if hook is None:
        raise LookupError("no pg_loss_reducer hook is configured")
    check = ResultCheck(hooks, hook, batch)
    masks = [mask.clone() for mask in batch["loss_masks"]]
    reduce = hooks.call(hook, list(batch["total_lengths"]), list(batch["response_lengths"]), masks, per_token)
    if not callable(reduce):
        raise check.wrong(f"it must return a function from token losses to their sum, not a {type(reduce).__name__}")

    def checked(values_R: Tensor) -> Tensor:
        total = check.scalar("the reduced loss", reduce(values_R))
        if values_R.requires_grad and len(values_R) and not total.requires_grad:
            raise check.wrong("the reduced loss has no gradient")
        return total

    return checked


def call_loss(
    hooks: HookCalls,
    hook: BoundHook,
    batch: dict[str, Any],
    logits_TV: Tensor,
    sum_of_sample_mean: Callable[[Tensor], Tensor],
    *,
    log_probs_and_entropy: Callable[..., Any],
) -> tuple[Tensor, dict[str, Any]]:
    """Return the `loss` hook's loss of a micro-batch and its metrics, with `loss` among them.

    Raises:
        HookResultError: the loss is not a scalar, or has no gradient although tokens are unmasked; a metric is neither
            a number nor a scalar tensor.
    """
    check = ResultCheck(hooks, hook, batch)
    result = hooks.call(
        hook,
        hooks.args,
        dict(batch),
        logits_TV,
        sum_of_sample_mean,
        log_probs_and_entropy=log_probs_and_entropy,
        parallel=hooks.parallel,
    )
    if not isinstance(result, tuple) or len(result) != len(("loss", "metrics")):
        raise check.wrong("it must return (loss, metrics)")
    loss = check.scalar("the loss", result[0]).float()
    if not loss.requires_grad:
        if any(bool(mask.any()) for mask in batch["loss_masks"]):
            raise check.wrong(
                "the loss has no gradient: compute it from `logits` or from log_probs_and_entropy(logits)"
            )
        loss = loss + 0.0 * logits_TV.sum()
    return loss, {**check.metrics(result[1]), "loss": loss.detach()}
