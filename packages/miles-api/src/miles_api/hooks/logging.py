"""Logging hooks: what is said about a rollout or an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample


@hook(
    flag="--custom-rollout-log-function-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    many=True,
    default="the built-in metrics",
)
def rollout_log(
    rollout_id: int,
    args: Args,
    samples: list[Sample],
    rollout_extra_metrics: dict[str, float],
    rollout_time: float,
    /,
) -> bool:
    """Log one rollout your own way.

    Called once per rollout with its flat samples; `rollout_time` is in seconds. Numbers that it adds to
    `rollout_extra_metrics` are logged with the built-in ones. True suppresses the built-in log.
    """
    raise NotImplementedError


@hook(
    flag="--custom-eval-rollout-log-function-path",
    since=(1, 0),
    side="rollout",
    moment="eval",
    default="the built-in metrics",
)
def eval_rollout_log(
    rollout_id: int, args: Args, data: dict[str, dict[str, Any]], extra_metrics: dict[str, float], /
) -> bool:
    """Log one evaluation your own way.

    Called once per evaluation; `data` is `RolloutFnEvalOutput.data`. Numbers that it adds to `extra_metrics` are logged
    with the built-in ones. True suppresses the built-in log.
    """
    raise NotImplementedError
