"""Files of one JSON object a line, each line written at once; a run that is resumed cuts what it makes again."""

from __future__ import annotations

import contextlib
import json
import os
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["JsonLines", "cut_after"]

_encode = msgspec.json.Encoder().encode


class JsonLines:
    """Appends to a file of JSON lines. Its methods raise `DataError` naming the file when it cannot be written."""

    def __init__(self, path: Path) -> None:
        """Open `path` for appending; half a line that a crash left there was cut before."""
        self._path = path
        try:
            # Unbuffered: what could not be written must not come back when the file is closed.
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise self._refusal(error) from error

    def append(self, line: dict[str, Any]) -> None:
        """Write one line. Numbers that are not finite become null: JSON has no other word for them."""
        self._put(_encode(line) + b"\n")

    def sync(self) -> None:
        """Return when every line is on the disk."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._refusal(error) from error

    def close(self) -> None:
        """Close the file; safe to call twice."""
        self._file.close()

    def _put(self, data: bytes) -> None:
        whole = self._file.tell()
        try:
            written = 0
            while written < len(data):
                written += self._file.write(data[written:])
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(whole)
            raise self._refusal(error) from error

    def _refusal(self, error: OSError) -> DataError:
        return DataError(f"{self._path} cannot be written: {error.strerror or error}")


def cut_after(path: Path, rollout_id: int) -> int:
    """Cut a file of rows at the first that belongs to a later rollout; return how many before it could not be read.

    Those are taken out too. Half a line at the end is not counted: a crash leaves it. Raises `DataError` when the file
    cannot be changed.
    """
    if not path.is_file():
        return 0
    damaged, aside = 0, path.with_name(f".{path.name}")
    try:
        with path.open("rb") as lines, aside.open("wb") as kept:
            for line in lines:
                of = _rollout_of(line)
                if of is None:
                    damaged += line.endswith(b"\n")
                elif of <= rollout_id:
                    kept.write(line)
                else:
                    break
        aside.replace(path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    return damaged


def _rollout_of(line: bytes) -> int | None:
    try:
        return int(json.loads(line)["rollout_id"]) if line.endswith(b"\n") else None
    except (ValueError, KeyError, TypeError):
        return None
