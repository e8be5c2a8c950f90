"""Which weights a model directory holds, told by its content without reading all of it. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

__all__ = ["weights_fingerprint"]

_PIECE = 1 << 14
"""Bytes read at the beginning, in the middle and at the end of each tensor: training moves all of a tensor, so that
copies of one model agree and what was trained from it does not."""


def weights_fingerprint(hf_dir: str) -> str:
    """Return a hash of a directory's safetensors: of every tensor its name, dtype, shape and a sample of its bytes.

    A tensor of up to 48 KiB is read whole, of a larger one 16 KiB at its beginning, middle and end. How tensors are
    spread over files does not count.

    Raises:
        DataError: a file that cannot be read as safetensors.
    """
    found: dict[str, bytes] = {}
    for path in sorted(Path(hf_dir).glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                found |= _tensors(file)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{path} cannot be read as safetensors: {error}") from error
    digest = hashlib.sha256()
    for name in sorted(found):
        digest.update(name.encode() + b"\0" + found[name])
    return digest.hexdigest()[:16]


def _tensors(file: BinaryIO) -> Iterator[tuple[str, bytes]]:
    """Yield each tensor's name and a hash of the rest."""
    size = int.from_bytes(file.read(8), "little")
    header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    for name, about in header.items():
        begin, end = about["data_offsets"]
        digest = hashlib.sha256(json.dumps([about["dtype"], about["shape"]]).encode())
        for start, length in _pieces(end - begin):
            file.seek(8 + size + begin + start)
            digest.update(file.read(length))
        yield name, digest.digest()


def _pieces(size: int) -> list[tuple[int, int]]:
    """Return where to read in a tensor of `size` bytes, and how much."""
    if size <= 3 * _PIECE:
        return [(0, size)]
    return [(start, _PIECE) for start in (0, (size - _PIECE) // 2, size - _PIECE)]
