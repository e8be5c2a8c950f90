"""Short hashes by which an engine's tensors are told from the trainer's. The driver imports this, so torch is not."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CHECKSUM", "checksums"]

CHECKSUM = "the first 16 hex digits of SHA-256 over a tensor's values as little-endian float32 in row-major order"
"""The whole definition; an engine that hashes like this says so with this sentence, and others are not compared."""


def checksums(tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return each tensor's hash by its name; casts to float32, so a bfloat16 copy of bfloat16 values hashes the same.

    Tensors lie on the CPU.
    """
    return {
        name: hashlib.sha256(tensor.detach().float().contiguous().numpy().data).hexdigest()[:16]
        for name, tensor in tensors.items()
    }
