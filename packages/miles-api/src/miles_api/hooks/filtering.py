"""Filtering hooks: which groups and samples train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import DynamicFilterOutput, Group
    from miles_api.sample import Sample


@hook(
    flag="--dynamic-sampling-filter-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    many=True,
    default="keeps every group",
)
def dynamic_filter(args: Args, samples: list[Sample], /, **kwargs: Any) -> DynamicFilterOutput | bool:
    """Decide whether a scored group enters the rollout; the loop samples another prompt for each one dropped.

    Called once per group, after scoring and before queueing. With several references the first drop wins.
    """
    raise NotImplementedError


@hook(flag="--buffer-filter-path", since=(1, 0), side="rollout", moment="sometimes", default="pop_first: oldest first")
def buffer_filter(args: Args, rollout_id: int | None, buffer: list[Group], num_samples: int, /) -> list[Group]:
    """Pick up to `num_samples` groups from the data source's buffer, removing them from it.

    Called by the default data source whenever it hands out prompts and the buffer is not empty.
    """
    raise NotImplementedError


@hook(
    flag="--rollout-sample-filter-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    many=True,
    default="keeps every sample",
)
def sample_filter(args: Args, data: list[Group], /) -> None:
    """Set `remove_sample = True` on samples that should not enter the loss.

    Called once per rollout with its final groups. Removed samples stay in advantage normalisation.
    """
    raise NotImplementedError


@hook(
    flag="--rollout-all-samples-process-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    many=True,
    default="does nothing",
)
def all_samples_process(args: Args, all_samples: list[Group], data_source: Any, /) -> None:
    """Look at everything the rollout generated, dropped groups included.

    Called once per rollout, after the dynamic filters, before the sample filters and conversion.
    """
    raise NotImplementedError
