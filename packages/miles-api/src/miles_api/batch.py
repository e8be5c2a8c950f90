"""`TrainBatch`: what conversion hands to the trainer, as columns of plain lists, one entry a sample."""

from collections.abc import Mapping
from typing import Any, NotRequired, TypedDict

from miles_api.errors import SampleError

__all__ = ["REQUIRED_COLUMNS", "TrainBatch", "check_columns"]


class TrainBatch(TypedDict):
    """Columns of equal length, sorted by (group_index, index). Unknown columns pass through to the trainer."""

    tokens: list[list[int]]
    """Prompt and response ids."""
    response_lengths: list[int]
    total_lengths: list[int]
    loss_masks: list[list[int]]
    """One 0 or 1 for each response token."""
    rewards: list[float]
    """After post-processing, so normalised within the group by default."""
    raw_reward: list[float]
    truncated: list[int]
    sample_indices: list[int]
    rollout_ids: list[int]
    group_indices: list[int]
    rollout_log_probs: NotRequired[list[list[float]]]
    rollout_routed_experts: NotRequired[list[Any]]
    teacher_log_probs: NotRequired[list[list[float]]]
    metadata: NotRequired[list[Any]]
    multimodal_train_inputs: NotRequired[list[Any]]
    round_number: NotRequired[list[int]]
    weight_versions: NotRequired[list[list[str]]]


REQUIRED_COLUMNS: frozenset[str] = TrainBatch.__required_keys__
_PER_RESPONSE_TOKEN = ("loss_masks", "rollout_log_probs", "teacher_log_probs")


def check_columns(batch: Mapping[str, Any]) -> None:
    """Raise `SampleError` unless every column is there, whole and consistent with the others."""
    missing = sorted(REQUIRED_COLUMNS - set(batch))
    if missing:
        raise SampleError(f"the train batch has no column {', '.join(missing)}")
    size = len(batch["tokens"])
    if size == 0:
        raise SampleError("the train batch holds no sample")
    for name, column in batch.items():
        _check_column(batch, name, column, size)
    for position in range(size):
        _check_lengths(batch, position)


def _check_column(batch: Mapping[str, Any], name: str, column: Any, size: int) -> None:
    if not hasattr(column, "__len__") or len(column) != size:
        found = len(column) if hasattr(column, "__len__") else repr(column)
        raise SampleError(f"column {name} has {found} entries for {size} samples")
    if name not in REQUIRED_COLUMNS and any(entry is None for entry in column):
        lacking = [batch["sample_indices"][i] for i, entry in enumerate(column) if entry is None]
        raise SampleError(f"column {name} is only partly there: samples {lacking[:8]} lack it")


def _check_lengths(batch: Mapping[str, Any], position: int) -> None:
    name = f"sample {batch['sample_indices'][position]}"
    tokens, length, total = (batch[key][position] for key in ("tokens", "response_lengths", "total_lengths"))
    if total != len(tokens) or length < 0:
        raise SampleError(f"{name}: {len(tokens)} tokens, total_lengths {total}, response_lengths {length}")
    if length >= total:
        raise SampleError(f"{name}: {total} tokens with a response of {length}: at least one prompt token is needed")
    for column in _PER_RESPONSE_TOKEN:
        if column in batch and len(batch[column][position]) != length:
            raise SampleError(f"{name}: {column} has {len(batch[column][position])} entries, response {length}")
