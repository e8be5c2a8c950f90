"""Which samples share a rank and which a micro-batch: work spread evenly, tokens within a budget.

Imports no torch; every rank comes to the same answer without talking.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from miles_train.options import BatchingOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from miles_api.config import RunConfig

__all__ = ["check_batching", "make_micro_batches", "pack_micro_batches", "spread"]


def spread(costs: Sequence[float], parts: int) -> list[list[int]]:
    """Return the positions of each part, ascending: costliest first, always to the part that has the least so far.

    No part costs more than 4/3 of the best there is, nor more than the mean and one sample. With at least as many
    samples as parts, each gets one.
    """
    shares: list[list[int]] = [[] for _ in range(parts)]
    # Of parts that cost the same the emptiest: samples may cost nothing.
    heap = [(0.0, 0, part) for part in range(parts)]
    for position in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        cost, size, part = heap[0]
        shares[part].append(position)
        heapq.heapreplace(heap, (cost + costs[position], size + 1, part))
    return [sorted(share) for share in shares]


def make_micro_batches(lengths: Sequence[int], options: BatchingOptions) -> list[list[int]]:
    """Return the positions of each micro-batch of a rank's samples, as the options say; every position is in one."""
    if options.use_dynamic_batch_size:
        return pack_micro_batches(lengths, options.max_tokens_per_gpu)
    size = options.micro_batch_size or 1
    return [list(range(start, min(start + size, len(lengths)))) for start in range(0, len(lengths), size)]


def pack_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the positions of each micro-batch, ascending, at most `max_tokens` tokens in each.

    They are as few as first-fit decreasing makes them, and filled evenly where that can be done with so many: the
    fullest decides over memory and over the bubbles of a pipeline. A sample of `max_tokens` or more gets a micro-batch
    of its own. The fullest come first, so that running out of memory shows at once.
    """
    packs = [[i] for i, length in enumerate(lengths) if length >= max_tokens]
    short = [i for i, length in enumerate(lengths) if length < max_tokens]
    packs += [[short[i] for i in pack] for pack in _even([lengths[i] for i in short], max_tokens)]
    return sorted(packs, key=lambda pack: -sum(lengths[i] for i in pack))


def _even(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Pack samples that all fit, in as many micro-batches as first-fit decreasing needs; evenly where that fits too."""
    filled = _first_fit(lengths, max_tokens)
    packs = spread(lengths, len(filled))
    return packs if all(sum(lengths[i] for i in pack) <= max_tokens for pack in packs) else filled


def _first_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    packs: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        fit = next((pack for pack, free in enumerate(room) if free >= length), len(packs))
        if fit == len(packs):
            packs.append([])
            room.append(max_tokens)
        packs[fit].append(position)
        room[fit] -= length
    return [sorted(pack) for pack in packs]


def check_batching(config: RunConfig) -> Iterator[str]:
    """Yield what is asked for and would not be done."""
    options = config.group(BatchingOptions)
    if options.use_dynamic_batch_size and options.micro_batch_size is not None:
        yield (
            f"--micro-batch-size {options.micro_batch_size} needs --no-use-dynamic-batch-size: otherwise micro-batches "
            f"hold up to --max-tokens-per-gpu {options.max_tokens_per_gpu}"
        )
    if options.balance_by_flops and not options.balance_data:
        yield "--balance-by-flops says how to balance, and --no-balance-data not to: drop one"
