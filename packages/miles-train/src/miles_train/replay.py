"""Train-side hooks on recorded training batches (`--save-debug-train-data`), without a model: for `miles hooks run`.

A replayer is called with the hook, `args` and one record, and returns named numbers: what the hook changed against what
was recorded. It raises the errors that training would raise. A record is one rank's share of a rollout, with old
log-probs, after the recorded run's own hooks.
"""

# ruff: noqa: N806  the shape suffix: R response tokens of the record

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_api.errors import DataError, MilesError
from miles_train.columns import to_tensors
from miles_train.hook_calls import call_advantage, call_importance_weights, call_pg_loss_reducer, call_postprocess
from miles_train.reducers import sum_of_sample_mean
from miles_train.train_hooks import HookCalls

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.record import RecordedTrainBatch

__all__ = ["replayers"]


def _advantage(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> dict[str, float]:
    """Compute advantages again: how many samples have others, and by how much."""
    data = _data(record)
    before = {name: data.pop(name, None) for name in ("advantages", "returns")}
    call_advantage(_calls(hook, args, record), hook, data)
    return {name: value for column, old in before.items() for name, value in _compared(column, old, data[column])}


def _postprocess(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> dict[str, float]:
    """Change the columns, which the recorded run's own hooks have changed already: what differs after that."""
    data = _data(record)
    before = {name: [_copy(value) for value in column] for name, column in data.items()}
    call_postprocess(_calls(hook, args, record), record.rollout_id, data)
    changes: dict[str, float] = {}
    for name, column in data.items():
        if all(isinstance(value, Tensor) for value in column):
            changes |= {key: value for key, value in _compared(name, before.get(name), column) if value}
        elif before.get(name) != column:
            changes[f"{name}: samples changed"] = float(len(column))
    return {**changes, "unmasked tokens": _total(data["loss_masks"]), "before": _total(before["loss_masks"])}


def _importance_weights(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> dict[str, float]:
    """Correct a stand-in for the policy loss: minus the advantages, which is the loss at an importance ratio of 1."""
    data = _data(record)
    _need(record, data, "log_probs", "rollout_log_probs", "advantages")
    pg_loss_R = -torch.cat(data["advantages"])
    reduce = sum_of_sample_mean(data["total_lengths"], data["response_lengths"], data["loss_masks"])
    loss_R, metrics = call_importance_weights(_calls(hook, args, record), data, pg_loss_R.clone(), data["log_probs"])
    mask_R = torch.cat(data["loss_masks"]) != 0
    count = len(data["tokens"])
    return {
        "loss": float(reduce(loss_R)) / count,
        "uncorrected": float(reduce(pg_loss_R)) / count,
        "tokens changed": float(((loss_R != pg_loss_R) & mask_R).sum()),
        "unmasked tokens": float(mask_R.sum()),
        **{name: float(reduce(values_R)) / count for name, values_R in metrics.items()},
    }


def _pg_loss_reducer(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> dict[str, float]:
    """Reduce minus the advantages, the policy loss at an importance ratio of 1, and compare with the default."""
    data = _data(record)
    _need(record, data, "advantages")
    per_token = bool(args.calculate_per_token_loss)
    default = sum_of_sample_mean(data["total_lengths"], data["response_lengths"], data["loss_masks"], per_token)
    pg_loss_R = -torch.cat(data["advantages"])
    reduce = call_pg_loss_reducer(_calls(hook, args, record), data, per_token)
    return {"loss": float(reduce(pg_loss_R)), "default reducer": float(default(pg_loss_R))}


def _loss(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> dict[str, float]:  # noqa: ARG001
    raise MilesError(
        "a loss hook cannot be replayed: it needs the logits of a model, which a recorded batch does not hold; "
        "train a small model with it instead"
    )


replayers: dict[str, Callable[[BoundHook, Args, RecordedTrainBatch], dict[str, float]]] = {
    "advantage": _advantage,
    "rollout_data_postprocess": _postprocess,
    "importance_weights": _importance_weights,
    "pg_loss_reducer": _pg_loss_reducer,
    "loss": _loss,
}
"""By hook; found under the entry point `train` of the group `miles.replay`."""


def _calls(hook: BoundHook, args: Args, record: RecordedTrainBatch) -> HookCalls:
    calls = HookCalls(args, {hook.spec.name: [hook]})
    calls.where = f" in rollout {record.rollout_id}"
    return calls


def _data(record: RecordedTrainBatch) -> dict[str, Any]:
    return to_tensors(record.columns)


def _need(record: RecordedTrainBatch, data: dict[str, Any], *names: str) -> None:
    lacking = [name for name in names if name not in data]
    if lacking:
        raise DataError(f"the record of rollout {record.rollout_id} has no column {', '.join(lacking)}")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _total(masks: list[Tensor]) -> float:
    return float(torch.cat(masks).sum())


def _compared(column: str, old: list[Tensor] | None, new: list[Tensor]) -> list[tuple[str, float]]:
    """Say how many samples differ, and by how much at most."""
    if old is None:
        return [(f"{column}: samples new", float(len(new)))]
    changed = [float((a - b).abs().max()) for a, b in zip(old, new, strict=True) if not torch.equal(a, b)]
    return [(f"{column}: samples changed", float(len(changed))), (f"{column}: largest change", max(changed, default=0))]
