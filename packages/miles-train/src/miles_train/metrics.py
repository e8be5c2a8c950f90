"""Collect a rollout's metrics on each rank and turn them into one set of numbers that all ranks agree on."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from miles_train.token_gap_types import Source, WorstToken
from miles_train.token_gaps import TokenGaps

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Metrics", "PhaseClock", "is_max"]


def is_max(name: str) -> bool:
    """Say whether of a metric of this name the largest value is kept, and not the mean."""
    return name.endswith("_max")


class Metrics:
    """Sums of parts, and maxima for names that end in `_max`.

    Parts are already divided by their denominators, so that adding micro-batches, steps and ranks gives the mean.
    Tensors stay on their device until `gather`.
    """

    def __init__(self) -> None:
        self._parts: dict[str, list[Tensor | float]] = {}
        self.token_gaps = TokenGaps()
        """Where trainer and engine disagree: on this rank, after `gather` on all."""

    def add(self, name: str, value: Tensor | float) -> None:
        """Add one part: a number, or a scalar tensor without gradient."""
        self._parts.setdefault(name, []).append(value)

    def add_all(self, values: dict[str, Tensor]) -> None:
        """Add one part to each of several metrics."""
        for name, value in values.items():
            self.add(name, value)

    def gather(self, *, contribute: bool, device: torch.device | str = "cpu") -> dict[str, float]:
        """Return the totals over all ranks, the same on each; a collective where there is more than one rank.

        Ranks that do not `contribute` (those whose numbers are copies of another's) still take part.
        """
        totals = _reduce_parts([self._local()] if contribute else [])
        gaps = self.token_gaps if contribute else TokenGaps()
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return totals
        ranks = _gather_ranks(_Rank(totals, list(gaps.sources.values()), gaps.worst), device)
        self.token_gaps = TokenGaps()
        for rank in ranks:
            self.token_gaps.merge(rank.sources, rank.worst)
        return _reduce_parts([rank.totals for rank in ranks])

    def _local(self) -> dict[str, float]:
        """Return this rank's totals, after one copy from the device."""
        tensors = {name: [p for p in parts if isinstance(p, Tensor)] for name, parts in self._parts.items()}
        flat = [p for parts in tensors.values() for p in parts]
        numbers = iter(torch.stack(flat).tolist() if flat else [])
        totals = {}
        for name, parts in self._parts.items():
            values = [p for p in parts if not isinstance(p, Tensor)] + [next(numbers) for _ in tensors[name]]
            totals[name] = max(values) if is_max(name) else sum(values)
        return totals


class _Rank(msgspec.Struct):
    """What one rank has to tell the others."""

    totals: dict[str, float]
    sources: list[Source]
    worst: list[WorstToken]


def _reduce_parts(ranks: list[dict[str, float]]) -> dict[str, float]:
    totals: dict[str, float] = {}
    for numbers in ranks:
        for name, value in numbers.items():
            if name not in totals:
                totals[name] = value
            else:
                totals[name] = max(totals[name], value) if is_max(name) else totals[name] + value
    return totals


def _gather_ranks(mine: _Rank, device: torch.device | str) -> list[_Rank]:
    """Return what every rank tells. Names differ between ranks (a pipeline's first stage has no loss), so they travel
    with their values."""
    payload = bytearray(msgspec.msgpack.encode(mine))
    size = torch.tensor([len(payload)], device=device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    lengths = [int(s) for s in sizes]
    packed = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
    packed[: len(payload)] = torch.frombuffer(payload, dtype=torch.uint8)
    gathered = [torch.empty_like(packed) for _ in sizes]
    dist.all_gather(gathered, packed)
    texts = [bytes(t[:n].cpu().tolist()) for t, n in zip(gathered, lengths, strict=True)]
    return [msgspec.msgpack.decode(text, type=_Rank) for text in texts]


class PhaseClock:
    """Wall-clock seconds by phase, added up over a rollout."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside the block under `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
