"""What the rollout process puts into a checkpoint: its data source, the loop, hook counts, random states."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import DataError
from miles_rollout.metrics import Totals

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.args import Args

__all__ = ["RolloutState", "load_source", "read", "save_source", "write"]

_FILE = "rollout.msgpack"


class RolloutState(msgspec.Struct, kw_only=True):
    """The state of the rollout process but for its data source."""

    loop: dict[str, Any] | None
    """What the rollout hook's `state_dict` returned; None for one that has no state."""
    hooks: dict[str, Totals]
    random: dict[str, Any]


def save_source(source: Any, view: Args, rollout_id: int, directory: str) -> None:
    """Let a data source save below `directory`, as `save` of its args; `DataError` if that cannot be written."""
    try:
        with _pointed(view, "save", directory):
            source.save(rollout_id)
    except OSError as error:
        raise DataError(f"{error.filename or directory} cannot be written: {error.strerror or error}") from error


def load_source(source: Any, view: Args, rollout_id: int, directory: str) -> None:
    """Let a data source load from `directory`, as `load` of its args."""
    with _pointed(view, "load", directory):
        source.load(rollout_id)


@contextlib.contextmanager
def _pointed(view: Args, option: str, directory: str) -> Iterator[None]:
    """Set a directory in the data source's view for one call; what is found there later was written by the source."""
    before = view.overlay()
    setattr(view, option, directory)
    try:
        yield
    finally:
        if option in before:
            setattr(view, option, before[option])
        else:
            delattr(view, option)


def write(directory: str, state: RolloutState) -> None:
    """Write the state into a staging directory. Raises `DataError` for what cannot be written."""
    path = Path(directory, _FILE)
    try:
        path.write_bytes(msgspec.msgpack.encode(state))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from error
    except (TypeError, ValueError) as error:
        raise DataError(f"{path}: the rollout hook's state_dict() holds more than plain values: {error}") from error


def read(directory: str) -> RolloutState:
    """Return what `write` wrote; `DataError` if it is missing or damaged."""
    path = Path(directory, _FILE)
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=RolloutState)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
