"""What hooks hand back, made into what the trainer computes with, or an error that names hook, sample and field."""

# ruff: noqa: N803  the shape suffix: R response tokens of the rollout or micro-batch

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_api.errors import HookResultError
from miles_train.advantages import ADVANTAGE_METRICS
from miles_train.guards import check_finite
from miles_train.mismatch import MISMATCH_METRICS
from miles_train.work import WORK_METRICS
from miles_train.zero_gradient import UNCUT, ZERO_GRADIENT_PREFIXES

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_train.train_hooks import HookCalls

__all__ = ["CRITIC_METRICS", "LOSSES", "OUR_METRICS", "POLICY_METRICS", "ResultCheck"]

CRITIC_METRICS = frozenset(
    {"value_loss", "value_clipfrac", "critic_grad_norm", "critic_lr", "explained_variance"}
    | {f"value_errors_{part}" for part in ("tokens", "returns", "returns_squared", "errors", "errors_squared")}
)
"""Names of metrics of a critic, and of the sums that they are made of."""
OUR_METRICS = frozenset(
    {"grad_norm", "lr", "tokens", "micro_batches", "samples_skipped", "skipped_steps", "zero_gradient_steps"}
    | MISMATCH_METRICS
    | ADVANTAGE_METRICS
    | WORK_METRICS
    | CRITIC_METRICS
)
"""Names of metrics that the trainer itself reports."""
POLICY_METRICS = frozenset({"loss", "pg_loss", "pg_clipfrac", "ppo_kl", "ratio_max", "entropy", "kl_loss", UNCUT})
"""Names of metrics of the policy loss."""
LOSSES = frozenset({"loss", "pg_loss", "value_loss"})
"""Names of metrics that are what is trained on, or an additive part of it: divided as the gradient is."""


class ResultCheck:
    """The checks of one call's results; `data` is the rollout data or micro-batch that the hook was given."""

    def __init__(self, hooks: HookCalls, hook: BoundHook, data: dict[str, Any]) -> None:
        self._hooks = hooks
        self._hook = hook
        self._lengths: list[int] = data["response_lengths"]
        self._indices: list[int] = data["sample_indices"]
        self._device = data["tokens"][0].device

    def wrong(self, problem: str) -> HookResultError:
        """Return the error for a result that is not what the stub says."""
        return self._hooks.wrong(self._hook, problem)

    def per_sample(self, field: str, column: Any) -> list[Tensor]:
        """Return a column of one finite 1-D fp32 tensor of response length a sample, detached, on our device."""
        if not isinstance(column, list | tuple) or len(column) != len(self._lengths):
            found = f"{len(column)} entries" if isinstance(column, list | tuple) else _kind(column)
            raise self.wrong(f"{field!r} must be a list of {len(self._lengths)} tensors, it is {found}")
        for values, length, index in zip(column, self._lengths, self._indices, strict=True):
            if not isinstance(values, Tensor) or values.shape != (length,):
                raise self.wrong(
                    f"{field!r} of sample {index} must be a 1-D tensor of {length} response tokens, it is "
                    f"{_kind(values)}"
                )
        result = [values.detach().to(self._device, torch.float32) for values in column]
        self.finite(field, torch.cat(result))
        return result

    def per_token(self, field: str, values: Any) -> Tensor:
        """Return a 1-D fp32 tensor over all response tokens, gradient and all."""
        total = sum(self._lengths)
        if not isinstance(values, Tensor) or values.shape != (total,):
            raise self.wrong(f"{field} must be a 1-D tensor of {total} response tokens, it is {_kind(values)}")
        return values.to(self._device, torch.float32)

    def finite(self, field: str, values_R: Tensor) -> None:
        """Raise for the first sample whose token values hold NaN or infinity."""
        who = f"{self._hooks.named(self._hook)}: {field!r}"
        try:
            check_finite(who, values_R.detach(), self._lengths, self._indices, self._hooks.where, HookResultError)
        except HookResultError:
            self._hook.stats.errors += 1
            raise

    def scalar(self, field: str, value: Any) -> Tensor:
        """Return a scalar tensor on our device, gradient and all."""
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise self.wrong(f"{field} must be a scalar tensor, it is {_kind(value)}")
        return value.reshape(()).to(self._device)

    def column_names(self, columns: dict[str, Any], taken: str) -> None:
        """Raise if a column has the name of one that the trainer computes afterwards."""
        if taken in columns:
            raise self.wrong(f"column {taken!r} is computed by the trainer; your own needs another name")

    def names(self, found: Any, taken: frozenset[str] = OUR_METRICS) -> dict[str, Any]:
        """Return a dict of metrics after looking at their names."""
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise self.wrong(f"the metrics must be a dict by name, they are {_kind(found)}")
        clash = sorted(name for name in found if name in taken or name.startswith(ZERO_GRADIENT_PREFIXES))
        if clash:
            raise self.wrong(f"the metric {clash[0]!r} has the name of one that the trainer reports")
        return found

    def metrics(self, found: Any) -> dict[str, Tensor | float]:
        """Return scalar metrics without gradient: numbers as floats, tensors as fp32."""
        return {name: self._metric(name, value) for name, value in self.names(found).items()}

    def _metric(self, name: str, value: Any) -> Tensor | float:
        if isinstance(value, Tensor) and value.numel() == 1:
            return value.detach().reshape(()).to(self._device, torch.float32)
        if isinstance(value, numbers.Real):
            return float(value)
        raise self.wrong(f"the metric {name!r} must be a number or a scalar tensor, it is {_kind(value)}")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return "None" if value is None else f"a {type(value).__name__}"
