r"""Recorded rollouts and training batches: one file a run, one checksummed record a rollout, readable while it grows.

    file   = magic, frame (the header), frame (a record) …
    magic  = b"\x89MILES\r\n"
    frame  = length of the payload, uint64 | its crc32, uint32 | crc32 of these 12 bytes, uint32 | payload

Integers are little-endian. A payload is a msgpack map of the fields of `DumpHeader`, `RecordedRollout` or
`RecordedTrainBatch`, the last two with a `type`; samples are in it as in `miles_api.wire`. Fields and types of record
that a reader does not know are passed over, missing fields get their defaults; a change that this does not cover raises
`SCHEMA`, and a reader refuses what is newer than its own.

A file holds prompts, responses and metadata as they are. Give the header `config.public()`: it is without secrets.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from miles_api.errors import ConfigError, DataError, WireError
from miles_api.packing.frames import MAGIC, FrameReader, frame_head, looks_like
from miles_api.recorded import (
    SCHEMA,
    DumpHeader,
    Record,
    RecordedGroup,
    RecordedRollout,
    RecordedTrainBatch,
    header_from,
    header_payload,
    record_from,
    record_payload,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = [
    "SCHEMA", "Dump", "DumpHeader", "DumpWriter", "RecordedGroup", "RecordedRollout", "RecordedTrainBatch", "read_dump",
]  # fmt: skip


class DumpWriter:
    """Writes a dump, handing each record to the system at once: a crash of this process loses at most one."""

    damage: str | None = None
    """What was cut off the end of the file that is continued."""

    def __init__(self, path: str | Path, header: DumpHeader, *, append: bool = False, after: int | None = None) -> None:
        """Open `path` and create directories above it; what is there is replaced.

        With `append` a dump is continued, after cutting off a record that a crash left unfinished, and with `after`
        also everything from the first record of a later rollout on. Raises `DataError` if the file cannot be written,
        or is no dump of this kind; `ConfigError` for a path with a placeholder.
        """
        self._path = _path(path)
        self._kind = header.kind
        self._after = math.inf if after is None else after
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            going_on = append and self._path.exists() and self._path.stat().st_size > 0
            self._file: BinaryIO = self._path.open("r+b" if going_on else "wb")
            try:
                if not (going_on and self._continue()):
                    self._file.write(MAGIC)
                    self._put(header_payload(header))
            except BaseException:
                self._file.close()
                raise
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error}") from error

    def write(self, record: Record) -> None:
        """Append one record. `WireError` names what in it cannot be written; the file is then as it was before."""
        if type(record) is not (RecordedRollout if self._kind == "rollout" else RecordedTrainBatch):
            raise WireError(f"{self._path} is a {self._kind} dump: it cannot hold a {type(record).__name__}")
        try:
            self._put(record_payload(record))
        except OSError as error:
            raise DataError(f"{self._path} cannot be written: {error}") from error

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def __enter__(self) -> DumpWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _put(self, payload: bytes) -> None:
        self._file.write(frame_head(payload))
        self._file.write(payload)
        self._file.flush()

    def _continue(self) -> bool:
        """Move behind the last whole record; False if the file ends before its header does."""
        frames = FrameReader(self._file, self._path)
        header = _read_header(frames, self._path) if frames.starts_well() else None
        if header is None:
            if not frames.cut_off:
                raise DataError(f"{self._path} cannot be continued: {frames.damage or 'it is no dump of Miles'}")
            self._file.truncate(self._file.seek(0))
            return False
        if header.kind != self._kind:
            raise DataError(f"{self._path} cannot be continued: it is a {header.kind} dump, not a {self._kind} dump")
        end = frames.end
        while (payload := frames.read()) is not None and not self._is_later(payload):
            end = frames.end
        self.damage = frames.damage
        self._file.truncate(self._file.seek(end))
        return True

    def _is_later(self, payload: bytes) -> bool:
        if self._after == math.inf:
            return False
        record = record_from(payload, f"{self._path}: a record, although undamaged")
        return record is not None and record.rollout_id > self._after


class Dump:
    """A dump on disk. Each iteration reads the file anew, holding one record at a time."""

    def __init__(self, path: Path, header: DumpHeader) -> None:
        self._path = path
        self.header = header
        self.damage: str | None = None
        """After an iteration: in words, what of the file's end could not be read; None if all of it was."""

    def __iter__(self) -> Iterator[Record]:
        with self._path.open("rb") as file:
            frames = FrameReader(file, self._path)
            frames.starts_well()
            frames.read()
            number = 0
            while (payload := frames.read()) is not None:
                number += 1
                record = record_from(payload, f"{self._path}: record {number}, although undamaged")
                if record is not None:
                    yield record
            self.damage = frames.damage


def read_dump(path: str | Path) -> Dump:
    """Open a dump and read its header; iterate over the result for the records.

    Raises `DataError` if there is no such file, if it is no dump (saying what it looks like), its header is damaged or
    a newer Miles wrote it; `ConfigError` for a path with a placeholder. Iterating raises `DataError` for a record that
    is whole but makes no sense.
    """
    path = _path(path)
    try:
        with path.open("rb") as file:
            frames = FrameReader(file, path)
            if not frames.starts_well():
                file.seek(0)
                raise DataError(f"{path} is no dump of Miles: {looks_like(file.read(16))}")
            header = _read_header(frames, path)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    if header is None:
        raise DataError(str(frames.damage))
    return Dump(path, header)


def _path(path: str | Path) -> Path:
    if "{" in str(path):
        raise ConfigError(f"{path}: a dump is one file for all rollouts of a run, give it a name without placeholders")
    return Path(path)


def _read_header(frames: FrameReader, path: Path) -> DumpHeader | None:
    payload = frames.read()
    return None if payload is None else header_from(payload, str(path))
