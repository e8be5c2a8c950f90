"""Columns of a rollout: validate them, split them into optimizer steps and ranks, turn them into tensors.

A `TrainBatch` is a dict of columns, each a list with one entry a sample. A rank's share of it, with per-sample 1-D
tensors in place of lists of numbers, is called `rollout_data` (the whole rollout) or `batch` (one micro-batch).
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import Any

import torch
from torch import Tensor

from miles_api.errors import SampleError

__all__ = [
    "COMPUTED_COLUMNS",
    "PER_RESPONSE_TOKEN",
    "select",
    "shard_columns",
    "split_steps",
    "take_share",
    "to_plain",
    "to_tensors",
    "validate_columns",
]

_REQUIRED = ("tokens", "response_lengths", "loss_masks")
PER_RESPONSE_TOKEN = ("loss_masks", "rollout_log_probs", "teacher_log_probs")
"""Columns of a rollout with one number a response token; fp32 tensors in `rollout_data`."""
COMPUTED_COLUMNS = ("log_probs", "ref_log_probs", "values", "advantages", "returns")
"""Columns of the same form that the trainer adds."""
_DTYPES = {"tokens": torch.int64} | dict.fromkeys((*PER_RESPONSE_TOKEN, *COMPUTED_COLUMNS), torch.float32)
_NAMED_AT_MOST = 8


def validate_columns(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that are present, after checking that they describe the same samples.

    Called once a rollout, on every rank, before anything is computed. A column that is `None` for every sample counts
    as absent and is left out.

    Raises:
        SampleError: a required column is missing, one has the name of a column that the trainer computes, a column is
            shorter or longer than `tokens` or present for some samples only, or lengths inside one sample disagree.
    """
    for name in _REQUIRED:
        if batch.get(name) is None:
            raise SampleError(f"the train batch has no column {name!r}; it has {', '.join(sorted(batch))}")
    for name in COMPUTED_COLUMNS:
        if batch.get(name) is not None:
            raise SampleError(f"column {name!r} is computed by the trainer; a rollout's own needs another name")
    count = len(batch["tokens"])
    if count == 0:
        raise SampleError("the train batch holds no sample")
    present = {name: column for name, column in batch.items() if _is_present(name, column, batch, count)}
    _check_lengths(present)
    return present


def _is_present(name: str, column: Any, batch: dict[str, Any], count: int) -> bool:
    """Say whether a column has values; raise `SampleError` if it has them for some samples only."""
    if column is None:
        return False
    if not isinstance(column, Sequence) or isinstance(column, str | bytes):
        raise SampleError(f"column {name!r} is a {type(column).__name__}, not a list with one entry a sample")
    if len(column) != count:
        raise SampleError(f"column {name!r} has {len(column)} entries for {count} samples")
    absent = [i for i, value in enumerate(column) if value is None]
    if 0 < len(absent) < count:
        raise SampleError(f"column {name!r} is missing for {len(absent)} of {count} samples: {_names(batch, absent)}")
    return not absent


def _check_lengths(columns: dict[str, Any]) -> None:
    """Raise `SampleError` where the lengths inside a sample disagree."""
    response_lengths = columns["response_lengths"]
    totals = [len(tokens) for tokens in columns["tokens"]]
    # The first token has nothing that predicts it, so a response needs at least one token before it.
    bad = [i for i, n in enumerate(response_lengths) if not 0 <= n < max(totals[i], 1)]
    if bad:
        i = bad[0]
        raise SampleError(
            f"column 'response_lengths': {response_lengths[i]} of {totals[i]} tokens are the response; at least one "
            f"token must come before it ({_names(columns, bad)})"
        )
    for name in PER_RESPONSE_TOKEN:
        if name not in columns:
            continue
        found = [len(values) for values in columns[name]]
        bad = [i for i, n in enumerate(found) if n != response_lengths[i]]
        if bad:
            i = bad[0]
            raise SampleError(
                f"column {name!r} has {found[i]} values for a response of {response_lengths[i]} tokens "
                f"({_names(columns, bad)})"
            )
    if "total_lengths" in columns:
        bad = [i for i, n in enumerate(columns["total_lengths"]) if n != totals[i]]
        if bad:
            i = bad[0]
            raise SampleError(
                f"column 'total_lengths' says {columns['total_lengths'][i]} for {totals[i]} tokens "
                f"({_names(columns, bad)})"
            )


def _names(batch: dict[str, Any], positions: list[int]) -> str:
    """Name samples for an error: by `sample_indices` where there are any, else by position."""
    indices = batch.get("sample_indices")
    shown = ", ".join(str(indices[i] if indices else i) for i in positions[:_NAMED_AT_MOST])
    more = f" and {len(positions) - _NAMED_AT_MOST} more" if len(positions) > _NAMED_AT_MOST else ""
    return f"sample{'s' if len(positions) > 1 else ''} {shown}{more}"


def shard_columns(batch: dict[str, Any], *, data_parallel_size: int, num_steps: int) -> list[list[list[int]]]:
    """Return the sample positions of each rank and step: `shards[rank][step]`, ascending.

    Called by every rank with the same columns, so that all agree without talking. Steps are contiguous runs of the
    rollout; within a step, samples go to the ranks longest first, each to the rank with the fewest tokens so far.

    Raises:
        SampleError: a step would have fewer samples than there are data-parallel ranks.
    """
    lengths = [len(tokens) for tokens in batch["tokens"]]
    groups = batch.get("group_indices") or list(range(len(lengths)))
    shards: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for step in split_steps(groups, num_steps):
        if len(step) < data_parallel_size:
            raise SampleError(
                f"an optimizer step of {len(step)} samples ({len(lengths)} samples in {num_steps} steps) cannot feed "
                f"{data_parallel_size} data-parallel ranks"
            )
        for rank, positions in enumerate(_balance(step, lengths, data_parallel_size)):
            shards[rank].append(positions)
    return shards


def split_steps(groups: Sequence[Any], num_steps: int) -> list[range]:
    """Cut the samples, in order, into `num_steps` steps of about the same number of samples.

    `groups` holds each sample's group; a cut that would fall inside a group moves to the nearest start of one, unless
    that would empty a step.

    Raises:
        SampleError: there are fewer samples than steps.
    """
    count = len(groups)
    if count < num_steps:
        raise SampleError(f"{count} samples cannot be split into {num_steps} optimizer steps")
    starts = [i for i in range(1, count) if groups[i] != groups[i - 1]]
    cuts = [0]
    for step in range(1, num_steps):
        ideal = step * count // num_steps
        # At least one sample remains for each later step, and each step ends before the next one's ideal end.
        last = min(count - (num_steps - step), (step + 1) * count // num_steps - 1)
        allowed = [i for i in starts if cuts[-1] < i <= last]
        cuts.append(min(allowed, key=lambda i: (abs(i - ideal), i)) if allowed else max(ideal, cuts[-1] + 1))
    cuts.append(count)
    return [range(start, end) for start, end in pairwise(cuts)]


def _balance(positions: Sequence[int], lengths: list[int], ranks: int) -> list[list[int]]:
    """Give each position to one of `ranks`, longest first, always to the one with the fewest tokens."""
    if ranks == 1:
        return [list(positions)]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    heap = [(0, rank) for rank in range(ranks)]
    for position in sorted(positions, key=lambda i: (-lengths[i], i)):
        tokens, rank = heap[0]
        shares[rank].append(position)
        heapq.heapreplace(heap, (tokens + lengths[position], rank))
    return [sorted(share) for share in shares]


def select(columns: dict[str, Any], positions: Sequence[int]) -> dict[str, Any]:
    """Return the same columns for some samples only, in the order of `positions`; tensors are shared, not copied."""
    return {name: [column[i] for i in positions] for name, column in columns.items()}


def take_share(
    columns: dict[str, Any], steps: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[dict[str, Any], list[list[int]]]:
    """Return a rank's samples as tensors, and for each step their positions among them; `steps` is its shard."""
    data = to_tensors(select(columns, [i for step in steps for i in step]), device)
    ends = list(accumulate(map(len, steps)))
    return data, [list(range(end - len(step), end)) for end, step in zip(ends, steps, strict=True)]


def to_tensors(columns: dict[str, Any], device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return the columns with 1-D tensors a sample: `tokens` int64, masks, log-probs and computed columns fp32.

    The tensors of one column are views of one allocation, moved to `device` in one copy. Other columns stay lists;
    `total_lengths` and `sample_indices` are added where they are missing.
    """
    data = dict(columns)
    data["total_lengths"] = [len(tokens) for tokens in columns["tokens"]]
    data.setdefault("sample_indices", list(range(len(columns["tokens"]))))
    for name, dtype in _DTYPES.items():
        if name in columns:
            data[name] = _split_tensor(columns[name], dtype, device)
    return data


def to_plain(rollout_data: dict[str, Any]) -> dict[str, Any]:
    """Return the columns as lists of plain values, which `to_tensors` turns back: what a record of the batch holds."""
    return {
        name: [value.tolist() if isinstance(value, Tensor) else value for value in column]
        for name, column in rollout_data.items()
    }


def _split_tensor(column: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device | str) -> list[Tensor]:
    """Turn a list of lists of numbers into views of one tensor."""
    flat = torch.tensor(list(chain.from_iterable(column)), dtype=dtype, device=device)
    return list(flat.split([len(values) for values in column]))
