"""Pack samples of different lengths into micro-batches of a bounded number of tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["pack_micro_batches"]


def pack_micro_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Return the positions of each micro-batch: first-fit decreasing, at most `max_tokens` tokens in each.

    A sample longer than `max_tokens` gets a micro-batch of its own. Every position appears exactly once, ascending
    within a micro-batch. The longest micro-batches come first, so that running out of memory shows at once.
    """
    if lengths and sum(lengths) <= max_tokens:
        return [list(range(len(lengths)))]
    batches: list[list[int]] = []
    room: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[position]
        fit = next((b for b, free in enumerate(room) if free >= length), None)
        if fit is None:
            batches.append([position])
            room.append(max_tokens - length)
        else:
            batches[fit].append(position)
            room[fit] -= length
    return [sorted(batch) for batch in batches]
