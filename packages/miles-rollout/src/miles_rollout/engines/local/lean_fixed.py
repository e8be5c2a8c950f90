"""The lean forward in fixed shapes: what a row gets depends, bit for bit, on nothing but that row.

How a product is rounded depends on the shapes it is computed in. So a prompt is computed alone; rows are decoded in
slots of a few fixed heights, filled up with rows that nobody reads; and attention runs over blocks of fixed width, of
which those past a row's end add exact zeros. Which heights round alike is for the machine's BLAS to say: it is tried
when the model is loaded, with every row at different places, and only heights that agree are used.
Element-wise functions that are not exactly rounded (hypot, exp, log) may round otherwise in a vector's tail; they run
along rows of fixed width here, or are replaced by exact ones.
"""

# ruff: noqa: N803 - tensor names end in their shape
from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from miles_rollout.engines.local.kv import KVPool, KVRows, Prefill
from miles_rollout.engines.local.lean import LeanModel

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["FixedShapeModel", "slots"]

_HEIGHTS = (8, 16, 32, 64, 128, 256)
_CASES = 8
"""Different rows that are tried; divides every height."""
_BLOCK = 64
"""Positions attended to at once; with it every row of the pool begins at a multiple of 64 bytes."""


class FixedShapeModel(LeanModel):
    """A `SlotModel` whose rows are independent to the bit; `heights` are the slots it decodes in, ascending."""

    deterministic = True

    def __init__(self, directory: Path, max_total_len: int | None) -> None:
        super().__init__(directory, max_total_len)
        # As `_normed` takes them here.
        self._floor, self._head_floor = self._floor.square(), self._head_floor.square()
        self.heights = _agreeing(self)

    def prefill(self, tokens_BL: torch.Tensor, lengths: torch.Tensor) -> Prefill:
        """Run each prompt alone, without its padding; see `SlotModel`."""
        longest = tokens_BL.shape[1]
        parts = [
            super(FixedShapeModel, self).prefill(tokens_BL[row : row + 1, :length], lengths[row : row + 1])
            for row, length in enumerate(lengths.tolist())
        ]
        if len(parts) == 1:
            return parts[0]
        layers = range(len(self.layout))
        return Prefill(
            [_stacked([part.keys[layer] for part in parts], longest) for layer in layers],
            [_stacked([part.values[layer] for part in parts], longest) for layer in layers],
            torch.cat([part.logits for part in parts]),
        )

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, pool: KVPool | KVRows, length: int) -> torch.Tensor:
        """Run one token per row, slot by slot; makes room in the pool for rows that fill up; see `SlotModel`."""
        rows, width = len(tokens), -(-length // _BLOCK) * _BLOCK
        heights = slots(rows, self.heights)
        padded = sum(heights)
        assert isinstance(pool, KVPool)
        pool.ensure(padded, width, rows)
        given = torch.zeros(2, padded, dtype=torch.int64)
        given[0, :rows], given[1, :rows] = tokens, positions
        logits, start = [], 0
        for height in heights:
            stop = start + height
            part = pool.part(start, stop)
            logits.append(super().decode(given[0, start:stop], given[1, start:stop], part, width))
            start = stop
        return (logits[0] if len(logits) == 1 else torch.cat(logits))[:rows]

    def _attend(self, q: torch.Tensor, seen_k: torch.Tensor, seen_v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        width = mask.shape[-1]
        if width == _BLOCK:
            return super()._attend(q, seen_k, seen_v, mask)
        each = zip(mask.split(_BLOCK, -1), seen_k.split(_BLOCK, -1), strict=True)
        scores = torch.cat([torch.baddbmm(m, q, k, alpha=self._scale) for m, k in each], -1)
        # Masked places have weight 0: whole vectors of them change no sum.
        weights = scores.softmax(-1).unflatten(-1, (-1, _BLOCK)).movedim(-2, 0).contiguous()
        attended = torch.bmm(weights[0], seen_v[:, :_BLOCK])
        for block in range(1, width // _BLOCK):
            v = seen_v[:, block * _BLOCK : (block + 1) * _BLOCK]
            attended = torch.baddbmm(attended, weights[block], v)
        return attended

    @staticmethod
    def _normed(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """As in `LeanModel`, of exactly rounded steps; `floor` is squared."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x / norm.mul_(norm).add_(floor).sqrt_()


def slots(rows: int, heights: tuple[int, ...]) -> list[int]:
    """Return the heights of the slots for so many rows: few slots, and few rows that only fill up."""
    chosen: list[int] = []
    while rows > 0:
        fits = next((height for height in heights if height >= rows), heights[-1])
        within = [height for height in heights if height <= rows]
        # A third more rows cost about as much as one more slot.
        height = within[-1] if within and 3 * (fits - rows) > rows else fits
        chosen.append(height)
        rows -= height
    return chosen


def _stacked(parts: list[torch.Tensor], length: int) -> torch.Tensor:
    """Join `[1, K, l, D]` to `[B, K, length, D]`; what is missing is 0."""
    first = parts[0]
    stacked = torch.zeros(len(parts), first.shape[1], length, first.shape[3])
    for row, part in enumerate(parts):
        stacked[row, :, : part.shape[2]] = part[0]
    return stacked


def _agreeing(model: FixedShapeModel) -> tuple[int, ...]:
    """Return the heights in which a row's logits are the same at every place and in every slot.

    Of several sets that agree among themselves the largest; slots of one row, which have one place, if there is none.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (_CASES,), generator=generator)
    positions = torch.randint(1, min(_BLOCK, model.max_positions), (_CASES,), generator=generator)
    kv_heads, dim, _ = model.layout[0]
    seen = [torch.randn(_CASES, kv_heads, _BLOCK, dim, generator=generator) for _ in range(2)]
    agreeing: dict[bytes, list[int]] = {}
    for height in _HEIGHTS:
        results = []
        for turned in range(2):
            order = (torch.arange(height) + turned) % _CASES
            # One layer's keys and values serve for all: what they hold does not matter here.
            keys, values = ([part[order]] * len(model.layout) for part in seen)
            rows = KVRows(keys, values, _BLOCK)
            logits = LeanModel.decode(model, tokens[order], positions[order], rows, _BLOCK)
            results += [part[order[:_CASES].argsort()] for part in logits.split(_CASES)]
        bits = {result.numpy().tobytes() for result in results}
        if len(bits) == 1:
            agreeing.setdefault(bits.pop(), []).append(height)
    return tuple(max(agreeing.values(), key=lambda heights: (len(heights), heights), default=[1]))
