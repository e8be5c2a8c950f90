"""A checkpoint is one directory, written aside and renamed: trainer, rollout and Hugging Face weights together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.run_options import RunOptions

__all__ = ["LATEST", "Progress", "find", "folder_of", "write"]

LATEST = "latest.json"
"""Names the newest checkpoint of a folder."""
_STATE = "state.json"


class Progress(msgspec.Struct, frozen=True):
    """How far a checkpointed run had come."""

    rollout_id: int
    """The last rollout whose training the checkpoint holds."""
    weight_version: int


def folder_of(run: RunOptions) -> Path:
    """Return where a run saves: `--save`, else a folder of its own run directory."""
    return Path(run.save) if run.save else Path(run.run_dir, "checkpoints")


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
    pointer = folder / f".{LATEST}"
    pointer.write_text(json.dumps({"directory": target.name}), encoding="utf-8")
    pointer.rename(folder / LATEST)
    return target


def find(folder: Path) -> tuple[Path, Progress]:
    """Return the latest checkpoint below `folder` (or `folder` itself if it is one) and how far it came."""
    pointer = folder / LATEST
    target = folder / json.loads(pointer.read_text(encoding="utf-8"))["directory"] if pointer.is_file() else folder
    if not (target / _STATE).is_file():
        raise DataError(f"--load {folder} holds no checkpoint: neither {LATEST} nor {_STATE}")
    return target, msgspec.json.decode((target / _STATE).read_bytes(), type=Progress)
