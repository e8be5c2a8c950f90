"""The short hashes by which an engine's weights are told from the trainer's, the same on both sides. Needs no torch."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["CHECKSUM", "checksums"]

CHECKSUM = "the first 16 hex digits of SHA-256 over a tensor's values as little-endian float32 in row-major order"
"""The whole definition; an engine that hashes like this says so with this sentence, and others are not compared."""


def checksums(tensors: Mapping[str, Any]) -> dict[str, str]:
    """Return the hash of each torch tensor by its name; casts to float32, so a bfloat16 copy of bfloat16 values hashes
    the same.

    Tensors lie on the CPU.
    """
    return {name: _checksum(tensor) for name, tensor in tensors.items()}


def _checksum(tensor: Any) -> str:
    # Of a copy: memory that numpy has seen can never be released and taken again, as engines and trainer do in turns.
    copy = tensor.detach().float().contiguous().clone()
    return hashlib.sha256(copy.numpy().data).hexdigest()[:16]
