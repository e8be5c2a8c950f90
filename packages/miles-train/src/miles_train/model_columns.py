"""The columns that models add to a rollout before its advantages: each a pass without gradient over all its samples."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_train.metrics import Metrics, PhaseClock
    from miles_train.models import Models
    from miles_train.passes import Packed, Passes

__all__ = ["model_columns"]


def model_columns(
    models: Models, passes: Passes, data: dict[str, Any], metrics: Metrics, clock: PhaseClock, *, old: bool
) -> dict[str, Any]:
    """Return `log_probs` if `old` ones are wanted now, and what the run's other models say: `values`, `ref_log_probs`,
    `teacher_log_probs`.

    Called once a rollout; empty on pipeline stages before the last. All passes share their micro-batches. The seconds
    of each count under the name of its column.
    """
    wanted: dict[str, Callable[[Packed], dict[str, Any]]] = {}
    if old:
        wanted["log_probs"] = partial(passes.old_log_probs, models.policy.model, metrics=metrics)
    if models.critic is not None:
        wanted["values"] = partial(passes.values, models.critic.model)
    for prefix, model in (("ref_", models.reference), ("teacher_", models.teacher)):
        if model is not None:
            wanted[f"{prefix}log_probs"] = partial(passes.log_probs, model, prefix=prefix)
    if not wanted:
        return {}
    packed = passes.pack(data, range(len(data["tokens"])))
    columns: dict[str, Any] = {}
    for name, run in wanted.items():
        with clock.phase(name):
            columns |= run(packed)
    return columns
