"""The default conversion: samples to columns of plain lists."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import SampleError
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.args import Args

__all__ = ["convert_samples"]

_OPTIONAL: dict[str, Callable[[Sample], Any]] = {
    "rollout_log_probs": lambda sample: sample.rollout_log_probs,
    "rollout_routed_experts": lambda sample: sample.rollout_routed_experts,
    "teacher_log_probs": lambda sample: sample.teacher_log_probs,
    "metadata": lambda sample: sample.train_metadata,
    "weight_versions": lambda sample: sample.weight_versions or None,
}


def convert_samples(
    args: Args, samples: list[Sample], *, raw_rewards: list[float], rewards: list[float]
) -> dict[str, Any]:
    """Return the trainer's columns, one entry a sample, in the order of `samples`.

    A removed sample keeps its place with a loss mask of zeros. Raises `SampleError` for a sample that contradicts
    itself, one with fields this build would ignore, and a column that only some samples have.
    """
    for sample in samples:
        sample.validate()
        if sample.multimodal_inputs or sample.multimodal_train_inputs:
            raise SampleError(f"sample {sample.index} has multimodal inputs, which this version does not train")
    batch: dict[str, Any] = {
        "tokens": [sample.tokens for sample in samples],
        "response_lengths": [sample.response_length for sample in samples],
        "total_lengths": [len(sample.tokens) for sample in samples],
        "loss_masks": [_loss_mask(sample) for sample in samples],
        "rewards": rewards,
        "raw_reward": raw_rewards,
        "truncated": [int(sample.status == Status.TRUNCATED) for sample in samples],
        "sample_indices": [sample.index for sample in samples],
        "rollout_ids": [sample.rollout_id for sample in samples],
        "group_indices": [sample.group_index for sample in samples],
    }
    for name, read in _OPTIONAL.items():
        column = [read(sample) for sample in samples]
        lacking = [sample.index for sample, entry in zip(samples, column, strict=True) if entry is None]
        if lacking and len(lacking) < len(samples):
            raise SampleError(f"only some samples have {name}: {len(lacking)} lack it, such as {lacking[:8]}")
        if not lacking:
            batch[name] = column
    engines = [sample.engines for sample in samples]
    # A router of another kind does not say who answered.
    return batch | ({"engines": engines} if any(engines) else {})


def _loss_mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
