"""What is kept of the gaps between trainer and engine: the record in `mismatch.jsonl`, read without torch."""

from __future__ import annotations

import msgspec

__all__ = ["BINS_PER_DECADE", "HIGHEST_DECADE", "LOWEST_DECADE", "NUM_BINS", "Source", "WorstToken"]

LOWEST_DECADE, HIGHEST_DECADE, BINS_PER_DECADE = -8, 2, 4
NUM_BINS = (HIGHEST_DECADE - LOWEST_DECADE) * BINS_PER_DECADE + 2
"""Bins are equally wide on a logarithmic scale; the first has what is below 1e-8, the last what is 100 nats or more."""


class Source(msgspec.Struct, kw_only=True):
    """The unmasked tokens that one engine sampled with one version of the weights."""

    engine: str
    """`host:port`; empty where nobody said."""
    version: str
    tokens: int = 0
    gap: float = 0.0
    """The sum of gaps, nats."""
    log_ratio: float = 0.0
    """The sum of trainer's minus engine's log-prob."""
    largest: float = 0.0
    bins: list[int] = msgspec.field(default_factory=lambda: [0] * NUM_BINS)
    """How many tokens have a gap in each bin."""

    def add(self, other: Source) -> None:
        """Add what another rank, micro-batch or rollout found."""
        self.tokens += other.tokens
        self.gap += other.gap
        self.log_ratio += other.log_ratio
        self.largest = max(self.largest, other.largest)
        self.bins = [one + more for one, more in zip(self.bins, other.bins, strict=True)]


class WorstToken(msgspec.Struct, kw_only=True):
    """One of the tokens with the largest gaps."""

    gap: float
    trainer: float
    """The trainer's log-prob."""
    rollout: float
    """The engine's log-prob."""
    sample: int
    position: int
    """Its place in the response."""
    tokens: list[int]
    """The tokens around it, itself among them."""
    at: int
    """Its place in `tokens`."""
    engine: str
    version: str
