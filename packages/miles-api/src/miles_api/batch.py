"""`TrainBatch`: what conversion hands to the trainer, as columns of plain lists, one entry a sample."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NotRequired, TypedDict

from miles_api.errors import SampleError

__all__ = ["PER_RESPONSE_TOKEN", "REQUIRED_COLUMNS", "TrainBatch", "check_columns"]


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
    engines: NotRequired[list[list[str]]]
    """Which engines answered for each sample, `host:port` in order of their first answer."""


REQUIRED_COLUMNS: frozenset[str] = TrainBatch.__required_keys__
PER_RESPONSE_TOKEN = ("loss_masks", "rollout_log_probs", "teacher_log_probs")
"""Columns with one number a response token."""
_ALWAYS_REQUIRED = ("tokens", "response_lengths", "loss_masks")
_NAMED_AT_MOST = 8


def check_columns(batch: Mapping[str, Any], required: Collection[str] = REQUIRED_COLUMNS) -> dict[str, Any]:
    """Return the columns that are present, after checking that they describe the same samples.

    Called on both sides of the process border: on what conversion returns, and by each trainer rank, which requires
    less of it. `tokens`, `response_lengths` and `loss_masks` are always required. A column that is `None`, or `None`
    for every sample, counts as absent.

    Raises:
        SampleError: a required column is missing, one is no list, shorter or longer than `tokens` or present for some
            samples only, or lengths inside one sample disagree.
    """
    required = {*required, *_ALWAYS_REQUIRED}
    _require(batch, required)
    size = _size(batch)
    present = {name: column for name, column in batch.items() if _is_present(batch, name, column, size)}
    _require(present, required)
    _check_lengths(present)
    return present


def _require(batch: Mapping[str, Any], required: Collection[str]) -> None:
    missing = sorted(name for name in required if batch.get(name) is None)
    if missing:
        there = ", ".join(sorted(name for name, column in batch.items() if column is not None)) or "none"
        raise SampleError(f"the train batch has no column {', '.join(map(repr, missing))}; it has {there}")


def _size(batch: Mapping[str, Any]) -> int:
    size = len(_as_list("tokens", batch["tokens"]))
    if size == 0:
        raise SampleError("the train batch holds no sample")
    return size


def _as_list(name: str, column: Any) -> Sequence[Any]:
    if not isinstance(column, Sequence) or isinstance(column, str | bytes):
        raise SampleError(f"column {name!r} is a {type(column).__name__}, not a list with one entry a sample")
    return column


def _is_present(batch: Mapping[str, Any], name: str, column: Any, size: int) -> bool:
    """Say whether a column has values; raise `SampleError` if it has them for some samples only."""
    if column is None:
        return False
    if len(_as_list(name, column)) != size:
        raise SampleError(f"column {name!r} has {len(column)} entries for {size} samples")
    absent = [i for i, value in enumerate(column) if value is None]
    if 0 < len(absent) < size:
        raise SampleError(f"column {name!r} is missing for {len(absent)} of {size} samples: {_names(batch, absent)}")
    return not absent


def _check_lengths(columns: dict[str, Any]) -> None:
    """Raise `SampleError` where the lengths inside a sample disagree."""
    totals, responses = _entry_lengths(columns, "tokens"), columns["response_lengths"]
    # The first token has nothing that predicts it, so a response needs at least one token before it.
    bad = [i for i, (n, total) in enumerate(zip(responses, totals, strict=True)) if not 0 <= n < total]
    if bad:
        raise SampleError(
            f"column 'response_lengths': {responses[bad[0]]} of {totals[bad[0]]} tokens are the response; at least one "
            f"token must come before it ({_names(columns, bad)})"
        )
    for name in PER_RESPONSE_TOKEN:
        if name not in columns:
            continue
        found = _entry_lengths(columns, name)
        if bad := _differing(found, responses):
            raise SampleError(
                f"column {name!r} has {found[bad[0]]} values for a response of {responses[bad[0]]} tokens "
                f"({_names(columns, bad)})"
            )
    said = columns.get("total_lengths", totals)
    if bad := _differing(said, totals):
        raise SampleError(
            f"column 'total_lengths' says {said[bad[0]]} for {totals[bad[0]]} tokens ({_names(columns, bad)})"
        )


def _entry_lengths(columns: dict[str, Any], name: str) -> list[int]:
    try:
        return list(map(len, columns[name]))
    except TypeError:
        raise SampleError(f"column {name!r} must have a list of numbers for each sample") from None


def _differing(one: Sequence[int], other: Sequence[int]) -> list[int]:
    if list(one) == list(other):
        return []
    return [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]


def _names(batch: Mapping[str, Any], positions: list[int]) -> str:
    """Name samples for an error: by `sample_indices` where there are any, else by position."""
    indices = batch.get("sample_indices")
    known = isinstance(indices, Sequence) and len(indices) == len(batch["tokens"])
    shown = ", ".join(str(indices[i] if known else i) for i in positions[:_NAMED_AT_MOST])
    more = f" and {len(positions) - _NAMED_AT_MOST} more" if len(positions) > _NAMED_AT_MOST else ""
    return f"sample{'s' if len(positions) > 1 else ''} {shown}{more}"
