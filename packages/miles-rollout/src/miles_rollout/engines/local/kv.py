"""Keys and values: a pool of fixed rows that grows by need, and freshly prefilled prompts that are copied into it.

Legend: B rows, K key/value heads, L positions, D head dimension.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import torch

__all__ = ["KVLayout", "KVPool", "KVRows", "Prefill", "PromptCache"]

KVLayout = list[tuple[int, int, int]]
"""Per layer: key/value heads, key dimension, value dimension."""

_LENGTH_STEP = 64


@dataclass
class Prefill:
    """Prompts computed together, right-padded to one length."""

    keys: list[torch.Tensor]
    """Per layer `[B, K, L, D]`; positions past a row's length hold nothing of use."""
    values: list[torch.Tensor]
    logits: torch.Tensor
    """`[B, vocabulary]` of each row's last token."""

    @property
    def length(self) -> int:
        """Positions held, padding included."""
        return self.keys[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (*self.keys, *self.values, self.logits))


class KVRows(NamedTuple):
    """Some successive rows of a `KVPool`, as views."""

    keys: list[torch.Tensor]
    """Per layer `[B, K, length, D]`."""
    values: list[torch.Tensor]
    length: int


class KVPool:
    """Rows of keys and values, `[rows, K, length, D]` per layer; both sizes grow by need, ahead of it up to the limits.

    Fresh memory is zeroed: masked positions get weight 0, and 0 times garbage could be NaN.
    """

    def __init__(self, layout: KVLayout, max_rows: int, max_length: int) -> None:
        self.layout, self.max_rows, self.max_length = layout, max_rows, max_length
        self.rows = self.length = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.release()

    @property
    def bytes_per_token(self) -> int:
        """Bytes one position of one row takes."""
        return sum(heads * (k + v) * 4 for heads, k, v in self.layout)

    def release(self) -> None:
        """Give all memory back; nothing may be running."""
        self.rows = self.length = 0
        self.keys = [torch.zeros(0, heads, 0, k) for heads, k, _ in self.layout]
        self.values = [torch.zeros(0, heads, 0, v) for heads, _, v in self.layout]

    def ensure(self, rows: int, length: int, used_rows: int) -> None:
        """Make room for `rows` of `length` positions; the first `used_rows` keep their content."""
        if rows <= self.rows and length <= self.length:
            return
        if rows > self.rows:
            rows = max(rows, min(self.max_rows, max(2 * self.rows, 8)))
        if length > self.length:
            wanted = max(length, self.length + self.length // 2)
            length = max(length, min(self.max_length, -(-wanted // _LENGTH_STEP) * _LENGTH_STEP))
        rows, length = max(rows, self.rows), max(length, self.length)
        for pool in (self.keys, self.values):
            for layer, old in enumerate(pool):
                new = torch.zeros(rows, old.shape[1], length, old.shape[3])
                if used_rows:
                    new[:used_rows, :, : self.length] = old[:used_rows]
                pool[layer] = new
        self.rows, self.length = rows, length

    def part(self, start: int, stop: int) -> KVRows:
        """Return rows `start` … `stop - 1`; they hold until the pool grows."""
        return KVRows([k[start:stop] for k in self.keys], [v[start:stop] for v in self.values], self.length)

    def put(self, start: int, prefill: Prefill, index: torch.Tensor) -> None:
        """Write row `index[i]` of `prefill` to row `start + i`; there must be room."""
        rows, length = slice(start, start + len(index)), min(prefill.length, self.length)
        for layer in range(len(self.layout)):
            self.keys[layer][rows, :, :length] = prefill.keys[layer].index_select(0, index)[:, :, :length]
            self.values[layer][rows, :, :length] = prefill.values[layer].index_select(0, index)[:, :, :length]

    def move(self, to: torch.Tensor, source: torch.Tensor, length: int) -> None:
        """Copy the first `length` positions of rows `source` to rows `to`; the two sets are disjoint."""
        for tensor in (*self.keys, *self.values):
            window = tensor[:, :, :length]
            window.index_copy_(0, to, window.index_select(0, source))


class PromptCache:
    """Recently prefilled prompts, so that the samples of a group are computed once; oldest batches leave first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._bytes = 0
        self._batches: OrderedDict[int, tuple[Prefill, list[bytes]]] = OrderedDict()
        self._where: dict[bytes, tuple[Prefill, int]] = {}
        self._next = 0

    def get(self, key: bytes) -> tuple[Prefill, int] | None:
        """Return the prefill that holds a prompt and its row there."""
        return self._where.get(key)

    def add(self, keys: list[bytes], prefill: Prefill) -> None:
        """Remember `prefill`, whose row i is the prompt `keys[i]`."""
        self._batches[self._next] = (prefill, keys)
        self._next += 1
        self._bytes += prefill.nbytes
        self._where.update((key, (prefill, row)) for row, key in enumerate(keys))
        while self._bytes > self.max_bytes and self._batches:
            _, (old, old_keys) = self._batches.popitem(last=False)
            self._bytes -= old.nbytes
            for old_key in old_keys:
                if self._where.get(old_key, (None,))[0] is old:
                    del self._where[old_key]

    def clear(self) -> None:
        """Forget everything; called when the weights change."""
        self._batches.clear()
        self._where.clear()
        self._bytes = 0
