"""Columns of a rollout: validate them, split them into optimizer steps and ranks, turn them into tensors.

A `TrainBatch` is a dict of columns, each a list with one entry a sample. A rank's share of it, with per-sample 1-D
tensors in place of lists of numbers, is called `rollout_data` (the whole rollout) or `batch` (one micro-batch).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_api.batch import PER_RESPONSE_TOKEN, check_columns
from miles_api.errors import SampleError, counted
from miles_train.batching import spread
from miles_train.siblings import MASK_SUMS

if TYPE_CHECKING:
    from collections.abc import Sequence

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

COMPUTED_COLUMNS = ("log_probs", "ref_log_probs", "values", "advantages", "returns")
"""Columns with one number a response token that the trainer adds; like `PER_RESPONSE_TOKEN` fp32 tensors in
`rollout_data`."""
_DTYPES = {"tokens": torch.int64} | dict.fromkeys((*PER_RESPONSE_TOKEN, *COMPUTED_COLUMNS), torch.float32)
_RESERVED = (*COMPUTED_COLUMNS, MASK_SUMS)


def validate_columns(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the columns that are present, after checking that they describe the same samples.

    Called once a rollout, on every rank, before anything is computed. A column that is `None` for every sample counts
    as absent and is left out.

    Raises:
        SampleError: a column has the name of one that the trainer computes, or `miles_api.batch.check_columns` finds
            something wrong.
    """
    taken = [name for name in _RESERVED if batch.get(name) is not None]
    if taken:
        raise SampleError(f"column {taken[0]!r} is computed by the trainer; a rollout's own needs another name")
    return check_columns(batch, required=())


def shard_columns(
    batch: dict[str, Any],
    *,
    data_parallel_size: int,
    num_steps: int,
    rollouts: Sequence[int] | None = None,
    costs: Sequence[float] | None = None,
    idle: Sequence[bool] | None = None,
    balance: bool = True,
) -> list[list[list[int]]]:
    """Return the sample positions of each rank and step: `shards[rank][step]`, ascending.

    Called by every rank with the same columns, so that all agree without talking. Steps are contiguous runs of the
    rollout, cut by `split_steps`; `rollouts` numbers each sample's. Within a step, `spread` gives each rank about the
    same part of the `costs`, by default the samples' tokens. Samples that are `idle` will be left out of the passes:
    they are spread on their own. Without `balance` the ranks take samples in turn.

    Raises:
        SampleError: the samples are too few to give each rank one in every step, or their rollouts to be told apart.
    """
    lengths = [len(tokens) for tokens in batch["tokens"]]
    groups = batch.get("group_indices") or list(range(len(lengths)))
    shards: list[list[list[int]]] = [[] for _ in range(data_parallel_size)]
    for step in split_steps(groups, num_steps, rollouts, least=data_parallel_size):
        if balance:
            shares = _balance(step, costs or lengths, idle, data_parallel_size)
        else:
            shares = [list(step[rank::data_parallel_size]) for rank in range(data_parallel_size)]
        for rank, share in enumerate(shares):
            shards[rank].append(share)
    return shards


def _balance(
    positions: Sequence[int], costs: Sequence[float], idle: Sequence[bool] | None, ranks: int
) -> list[list[int]]:
    """Give each rank about the same part of the costs of what runs, and at least one sample."""
    shares: list[list[int]] = [[] for _ in range(ranks)]
    running = [i for i in positions if not (idle and idle[i])]
    # In reverse: where fewer samples run than there are ranks, the last ranks have none of them.
    for members, order in ((running, shares), (sorted(set(positions) - set(running)), shares[::-1])):
        for share, part in zip(order, spread([costs[i] for i in members], ranks), strict=True):
            share.extend(members[i] for i in part)
    return [sorted(share) for share in shares]


def split_steps(
    groups: Sequence[Any], num_steps: int, rollouts: Sequence[Any] | None = None, *, least: int = 1
) -> list[range]:
    """Cut the samples, in order, into `num_steps` steps of about the same number of samples, and of `least` or more.

    `groups` holds each sample's group; a cut that would fall inside a group moves to the start of one, unless that
    moves it by more than a step. `rollouts` holds each sample's rollout, by default one of its own: none is ever cut.

    Raises:
        SampleError: there are too few samples, or too few rollouts that can be told apart by a cut.
    """
    count = len(groups)
    ends = _ends_of_rollouts(rollouts) if rollouts is not None else range(1, count)
    # Cuts far from ideal ones matter only where there is no other way.
    for reach in (2 * (count // num_steps + 1), count):
        cuts = _cuts(groups, num_steps, ends, least, reach)
        if cuts:
            return [range(start, end) for start, end in pairwise(cuts)]
    different = len(set(rollouts or ()))
    parts = f" of {different} rollouts, which are never cut," if different else ""
    each = f" of at least {least}, one for each data-parallel rank" if least > 1 else ""
    apart = "; samples of a rollout must follow one another" if len(ends) < different - 1 else ""
    raise SampleError(
        f"{counted(count, 'sample')}{parts} cannot be split into {counted(num_steps, 'optimizer step')}{each}{apart}"
    )


def _cuts(groups: Sequence[Any], num_steps: int, ends: Sequence[int], least: int, reach: int) -> tuple[int, ...] | None:
    """Return the borders of the steps, each at most `reach` from its ideal place and all together as near as can be."""
    count = len(groups)
    # By the end of the steps so far: how far their cuts are from ideal ones, and the cuts.
    found: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, (0,))}
    for step in range(1, num_steps + 1):
        before, found = found, {}
        earlier, best = iter(before), None
        start, ideal = next(earlier, count), step * count // num_steps
        near = ends[bisect_left(ends, ideal - reach) : bisect_right(ends, ideal + reach)]
        for end in near if step < num_steps else [count]:
            while start <= end - least:
                best = min(best, before[start]) if best else before[start]
                start = next(earlier, count)
            if best:
                inside = end < count and groups[end] == groups[end - 1]
                off = abs(end - ideal) + (count / num_steps if inside else 0)
                found[end] = (best[0] + off, (*best[1], end))
    return found[count][1] if count in found else None


def _ends_of_rollouts(rollouts: Sequence[Any]) -> list[int]:
    """Return the positions at which no rollout has samples on both sides."""
    last = {rollout: position for position, rollout in enumerate(rollouts)}
    reach = list(accumulate((last[rollout] for rollout in rollouts), max))
    return [position for position in range(1, len(rollouts)) if reach[position - 1] < position]


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
