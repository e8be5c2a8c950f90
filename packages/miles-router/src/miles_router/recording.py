"""Requests and answers in a file: written by the `recorder` middleware, answered from by `miles router --replay`.

Layout as in `miles_api.record`: checksummed frames, the first of them the header, each a msgpack map. It holds bodies
as they were, and of headers only those of answers: a request's may be secret.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec

from miles_api.errors import DataError
from miles_api.packing.frames import MAGIC, FrameReader, frame_head, looks_like

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .messages import Scope

__all__ = ["Exchange", "RecordingWriter", "read_exchange", "read_recording", "target_of"]

_KIND, _SCHEMA = "miles-router recording", 1


class _Header(msgspec.Struct):
    kind: str
    schema: int


class Exchange(msgspec.Struct, omit_defaults=True):
    """One request and its answer."""

    at: float
    """When it arrived, in seconds since 1970."""
    seconds: float
    """How long it took."""
    method: str
    target: bytes
    """Path and query, as they were sent."""
    request: bytes
    status: int
    headers: list[tuple[bytes, bytes]]
    """Those of the answer, without cookies."""
    pieces: list[bytes]
    """The answer's body, as it came."""
    complete: bool = True
    """False if the answer was cut off, its client left, or it came before the request was read."""


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Exchange).decode


class RecordingWriter:
    """Appends to a recording, or begins one; what a crash left unfinished at its end is cut off."""

    def __init__(self, path: str) -> None:
        """Open the file. Raises `DataError` if it cannot be written, or holds something else."""
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch(mode=0o600)
            self._file: BinaryIO = self._path.open("r+b", buffering=0)  # type: ignore[assignment]
            self._size = self._end()
            self._file.truncate(self._file.seek(self._size))
            # It holds prompts and answers: for its owner alone, whoever made the file.
            os.fchmod(self._file.fileno(), 0o600)
            if not self._size:
                header = _encode(_Header(_KIND, _SCHEMA))
                self._put(MAGIC + frame_head(header) + header)
        except OSError as error:
            raise DataError(f"the recording {path} cannot be written: {error}") from error

    def write(self, exchange: Exchange) -> None:
        """Append one record. Raises `OSError`, for a full disk say; the file is then as it was before."""
        payload = _encode(exchange)
        self._put(frame_head(payload) + payload)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        try:
            if self._file.write(data) < len(data):
                raise OSError(errno.ENOSPC, "the disk is full")
        except OSError:
            self._file.truncate(self._file.seek(self._size))
            raise
        self._size += len(data)

    def _end(self) -> int:
        frames = _opened(self._file, self._path)
        while frames is not None and frames.read() is not None:
            pass
        return 0 if frames is None else frames.end


def _opened(file: BinaryIO, path: Path) -> FrameReader | None:
    """Return a reader behind the header; None for a file that ends before its header does."""
    frames = FrameReader(file, path)
    payload = frames.read() if frames.starts_well() else None
    if payload is None:
        if not frames.cut_off:
            file.seek(0)
            raise DataError(f"{path} is no recording: {frames.damage or looks_like(file.read(8))}")
        return None
    try:
        header = msgspec.msgpack.decode(payload, type=_Header)
    except msgspec.MsgspecError:
        header = _Header("a dump of another kind", 0)
    if header.kind != _KIND or header.schema > _SCHEMA:
        raise DataError(f"{path} is no recording that this version reads: {header.kind}, schema {header.schema}")
    return frames


def target_of(scope: Scope) -> bytes:
    """Return a request's path and query, as they were sent."""
    query = scope["query_string"]
    return scope["raw_path"] + b"?" + query if query else scope["raw_path"]


def read_recording(path: str) -> Iterator[tuple[int, int, Exchange]]:
    """Yield place, length and record of each exchange in a recording. Raises `DataError` for what is none.

    A damaged end, as a crash leaves it, is left out.
    """
    try:
        with Path(path).open("rb") as file:
            frames = _opened(file, Path(path))
            while frames is not None and (payload := frames.read()) is not None:
                yield frames.end - len(payload), len(payload), _decode(payload)
    except OSError as error:
        raise DataError(f"the recording {path} cannot be read: {error.strerror}") from error


def read_exchange(file: BinaryIO, place: int, length: int) -> Exchange:
    """Return one record of an open recording, at the place that `read_recording` gave."""
    file.seek(place)
    return _decode(file.read(length))
