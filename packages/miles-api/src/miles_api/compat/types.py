"""Types of the older stacks that have no counterpart of their own here."""

from __future__ import annotations

import abc
from collections import Counter
from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import (
    DynamicFilterOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.rollout_types import Group

__all__ = [
    "BaseRolloutFn",
    "DataSource",
    "MetricGatherer",
    "RolloutBatch",
    "RolloutFnInput",
    "RolloutFnOutput",
    "RolloutFnProtocol",
    "call_dynamic_filter",
    "call_rollout_fn",
]

RolloutBatch = dict[str, list[Any]]
RolloutFnInput = RolloutFnTrainInput | RolloutFnEvalInput
RolloutFnOutput = RolloutFnTrainOutput | RolloutFnEvalOutput


class DataSource(abc.ABC):
    """The base of data sources written for Miles or slime; `add_samples` may be left out by one that only reads."""

    @abc.abstractmethod
    def get_samples(self, num_samples: int) -> list[Group]: ...

    def add_samples(self, samples: list[Group]) -> None:  # noqa: ARG002
        """Refuse groups that come back."""
        raise RuntimeError(f"{type(self).__name__} takes no groups back: give it add_samples")

    @abc.abstractmethod
    def save(self, rollout_id: int) -> None: ...

    @abc.abstractmethod
    def load(self, rollout_id: int | None = None) -> None: ...


class BaseRolloutFn:
    """The base of rollout hooks in class form."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        self.args = input.args
        self.data_source = input.data_source

    def __call__(self, input: RolloutFnTrainInput | RolloutFnEvalInput) -> Any:  # noqa: A002
        raise NotImplementedError(f"{type(self).__name__} lacks __call__")


RolloutFnProtocol = BaseRolloutFn


class MetricGatherer:
    """Count the groups that dynamic filters dropped, by reason."""

    def __init__(self) -> None:
        self._dropped: Counter[str] = Counter()

    def on_dynamic_filter_drop(self, reason: str | None) -> None:
        """Count one group; without a reason it is not counted."""
        if reason:
            self._dropped[reason] += 1

    def collect(self) -> dict[str, int]:
        """Return the counts as metrics."""
        return {f"rollout/dynamic_filter/drop_{reason}": count for reason, count in self._dropped.items()}


def call_dynamic_filter(fn: Callable[..., Any] | None, *args: Any, **kwargs: Any) -> DynamicFilterOutput:
    """Call a filter; no filter keeps, and a bare truth value becomes a `DynamicFilterOutput`."""
    if fn is None:
        return DynamicFilterOutput(True)
    verdict = fn(*args, **kwargs)
    return verdict if isinstance(verdict, DynamicFilterOutput) else DynamicFilterOutput(verdict)


def call_rollout_fn(fn: Callable[..., Any], *args: Any, evaluation: bool, **kwargs: Any) -> RolloutFnOutput:
    """Call a rollout function in its plain form and wrap a bare list or dict."""
    output = fn(*args, **kwargs, evaluation=evaluation)
    if isinstance(output, RolloutFnTrainOutput | RolloutFnEvalOutput):
        return output
    return RolloutFnEvalOutput(output) if evaluation else RolloutFnTrainOutput(output)
