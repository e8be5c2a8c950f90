"""Conversion hooks: from samples to the trainer's columns."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.batch import TrainBatch
    from miles_api.sample import Sample


@hook(
    flag="--custom-convert-samples-to-train-data-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    default="the built-in columns",
)
def convert_samples(
    args: Args, samples: list[Sample], /, *, raw_rewards: list[float], rewards: list[float]
) -> TrainBatch | dict[str, Any]:
    """Turn the samples of one rollout into columns of plain lists.

    Called once per rollout, in the rollout process, without torch; `samples` is flat, sorted by group_index and index.
    """
    raise NotImplementedError


@hook(
    flag="--rollout-data-postprocess-path",
    since=(1, 0),
    side="train",
    moment="rollout",
    many=True,
    default="does nothing",
)
def rollout_data_postprocess(args: Args, rollout_id: int, rollout_data: dict[str, Any], /) -> None:
    """Change the trainer's columns in place: per-sample 1-D tensors, whole responses on every CP rank.

    Called on every rank of the last pipeline stage, once per rollout, after log-probs and advantages (which a
    supervised loss does not have) and before normalisers and micro-batches, so changed loss masks count in
    denominators. Tokens, lengths and sample indices may not change; a column may be added, one entry a sample.
    """
    raise NotImplementedError
