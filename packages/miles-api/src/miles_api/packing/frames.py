"""Checksummed frames in a file, read one at a time up to the first that is not whole. Layout: `miles_api.record`."""

from __future__ import annotations

import struct
import zlib
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MAGIC", "FrameReader", "frame_head", "looks_like"]

MAGIC = b"\x89MILES\r\n"
"""Like PNG's: a byte that is no text, and a line end that a text-mode copy would change."""
_HEAD = struct.Struct("<QI")
_CHECK = struct.Struct("<I")
_HEAD_SIZE = _HEAD.size + _CHECK.size

_KNOWN_STARTS = {
    b"PK\x03\x04": "a zip archive, which is what torch.save writes",
    b"\x80": "a pickle, which is what torch.save and pickle write",
    b"\x1f\x8b": "a gzip archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"PAR1": "a Parquet file",
    b"{": "JSON",
    b"[": "JSON or TOML",
}


def frame_head(payload: bytes) -> bytes:
    """Return what stands before a payload: its length, its checksum, and a checksum of these two."""
    head = _HEAD.pack(len(payload), zlib.crc32(payload))
    return head + _CHECK.pack(zlib.crc32(head))


def looks_like(start: bytes) -> str:
    """Say what a file that begins with `start` and is no dump seems to be."""
    for known, name in _KNOWN_STARTS.items():
        if start.startswith(known):
            return f"it looks like {name}"
    return f"it begins with {start[:8]!r}" if start else "it is empty"


class FrameReader:
    """Reads the frames of an open file; the first is the header, the others are records 1, 2, …."""

    damage: str | None = None
    """In words, why reading stopped before the end of the file."""
    cut_off = False
    """The file ends too early; False with `damage`: its bytes were changed."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file = file
        self._path = path
        self._size = file.seek(0, 2)
        self._number = 0
        self.end = 0
        """Where the last whole frame ends, bytes from the start."""

    def starts_well(self) -> bool:
        """Go to the first frame; False if the file is no dump, or ends within the first bytes (`cut_off`)."""
        self._file.seek(0)
        start = self._file.read(len(MAGIC))
        self.end = len(MAGIC)
        self.cut_off = start != MAGIC and MAGIC.startswith(start)
        return start == MAGIC

    def read(self) -> bytes | None:
        """Return the next payload; None at the end of the file, or at what is not whole, which `damage` describes."""
        left = self._size - self.end
        if left == 0 and self._number:
            return None
        head = self._file.read(_HEAD_SIZE)
        if len(head) < _HEAD_SIZE:
            return self._stop(cut_off=True)
        length, checksum = _HEAD.unpack_from(head)
        if zlib.crc32(head[: _HEAD.size]) != _CHECK.unpack_from(head, _HEAD.size)[0]:
            return self._stop(cut_off=False)
        # The length is checked above and against the file: damage cannot make this read more than there is.
        payload = self._file.read(length) if length <= left - _HEAD_SIZE else b""
        if len(payload) < length:
            return self._stop(cut_off=True)
        if zlib.crc32(payload) != checksum:
            return self._stop(cut_off=False)
        self._number += 1
        self.end += _HEAD_SIZE + length
        return payload

    def _stop(self, *, cut_off: bool) -> None:
        lost, whole = self._size - self.end, self._number - 1
        here = f"record {self._number}" if self._number else "its header"
        if cut_off:
            problem = f"{self._path} ends within {here}: its writer was stopped, or the file is not all there"
        else:
            problem = f"{self._path} is damaged in {here}, at byte {self.end}: the checksum does not match"
        before = f"; {whole} whole {'record stands' if whole == 1 else 'records stand'} before it" if whole >= 0 else ""
        self.cut_off = cut_off
        self.damage = f"{problem}{before}, the last {lost} bytes of the file are lost"
