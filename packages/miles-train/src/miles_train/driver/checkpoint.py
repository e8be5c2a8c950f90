"""A checkpoint is one directory, written aside and renamed: trainer, rollout and Hugging Face weights together."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

__all__ = ["Progress", "find", "write"]

_LATEST = "latest.json"
_STATE = "state.json"


class Progress(msgspec.Struct, frozen=True):
    """How far a checkpointed run had come."""

    rollout_id: int
    """The last rollout whose training the checkpoint holds."""
    weight_version: int


def write(folder: Path, progress: Progress, parts: dict[str, Callable[[str], None]]) -> Path:
    """Write `folder`/rollout_N: each of `parts` fills the subdirectory of its name; then it becomes the latest."""
    target = folder / f"rollout_{progress.rollout_id:06d}"
    staging = folder / f".{target.name}.staging"
    shutil.rmtree(staging, ignore_errors=True)
    for name, fill in parts.items():
        (staging / name).mkdir(parents=True)
        fill(str(staging / name))
    (staging / _STATE).write_bytes(msgspec.json.encode(progress))
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    pointer = folder / f".{_LATEST}"
    pointer.write_text(json.dumps({"directory": target.name}), encoding="utf-8")
    pointer.rename(folder / _LATEST)
    return target


def find(folder: Path) -> tuple[Path, Progress]:
    """Return the latest checkpoint below `folder` (or `folder` itself if it is one) and how far it came."""
    pointer = folder / _LATEST
    target = folder / json.loads(pointer.read_text(encoding="utf-8"))["directory"] if pointer.is_file() else folder
    if not (target / _STATE).is_file():
        raise DataError(f"--load {folder} holds no checkpoint: neither {_LATEST} nor {_STATE}")
    return target, msgspec.json.decode((target / _STATE).read_bytes(), type=Progress)
