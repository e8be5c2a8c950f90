"""What the driver tells the trainer ranks about one push, and what they answer. Needs no torch."""

from __future__ import annotations

import msgspec

from miles_api.services import Endpoint

__all__ = ["Plan", "Sent"]


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """One push, the same for every trainer rank."""

    how: str
    """`tensor` or `broadcast`."""
    version: str
    receivers: list[Endpoint]
    """The engines that get weights; each of their tensor-parallel ranks receives."""
    bucket_bytes: int
    hashed: bool
    """Whether hashes of all tensors are wanted."""
    flush: bool
    """Whether engines forget what they computed with the old weights: those that keep running requests cannot."""


class Sent(msgspec.Struct, kw_only=True):
    """What one rank, or all together, have sent."""

    gone: dict[str, str] = msgspec.field(default_factory=dict)
    """Engines that died meanwhile, by URL, and how it was noticed."""
    refused: dict[str, str] = msgspec.field(default_factory=dict)
    """Engines that did not take what they got, and what they said."""
    checksums: dict[str, str] = msgspec.field(default_factory=dict)
    dtype: str = ""
    bytes: int = 0

    def add(self, other: Sent) -> None:
        """Take in what another rank has sent."""
        self.gone |= other.gone
        self.refused |= other.refused
        self.checksums |= other.checksums
        self.dtype = self.dtype or other.dtype
        self.bytes += other.bytes
