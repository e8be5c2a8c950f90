"""JSON documents over a pipe, each behind its length. Standard library alone."""

from __future__ import annotations

import json
import os
import struct
from typing import Any

__all__ = ["LENGTH", "pack", "read", "write"]

LENGTH = struct.Struct(">I")


def pack(document: Any) -> bytes:
    """Return a document as it travels."""
    body = json.dumps(document, ensure_ascii=True).encode()
    return LENGTH.pack(len(body)) + body


def read(descriptor: int) -> Any:
    """Return the next document, None at the end."""
    header = _exactly(descriptor, LENGTH.size)
    return None if header is None else json.loads(_exactly(descriptor, LENGTH.unpack(header)[0]) or b"null")


def write(descriptor: int, document: Any) -> None:
    """Write a document, all of it."""
    left = memoryview(pack(document))
    while left:
        left = left[os.write(descriptor, left) :]


def _exactly(descriptor: int, count: int) -> bytes | None:
    parts = bytearray()
    while len(parts) < count:
        part = os.read(descriptor, count - len(parts))
        if not part:
            return None
        parts += part
    return bytes(parts)
