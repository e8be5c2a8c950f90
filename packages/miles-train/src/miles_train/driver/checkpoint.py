"""A checkpoint is one directory, written aside and renamed: trainer, rollout and Hugging Face weights together.

    rollout_000004/state.json          how far the run had come, whose it is, and every other file with its size
    rollout_000004/trainer, rollout, hf
    latest.json                        names the newest
    .rollout_000005.1f….staging        a save that goes on, or was killed
    .rollout_000001.1f….removed        a deletion that goes on, or was killed

Only a directory whose files are all there counts; what a kill left behind is removed by the next start.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import DataError, MilesError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.run_options import RunOptions

__all__ = ["LATEST", "State", "find", "folder_of", "holds_checkpoints", "names_after", "retain", "sweep", "write"]

LATEST = "latest.json"
"""Names the newest checkpoint of a folder."""
_STATE = "state.json"
_FORMAT = 1
_NAME = re.compile(r"rollout_(\d{6,})")
_LEFTOVER = re.compile(r"\.rollout_\d{6,}\.[0-9a-f]+\.(staging|removed)|\.latest\.json")


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint says about itself and the run that wrote it."""

    rollout_id: int
    """The last rollout whose training the checkpoint holds."""
    weight_version: int
    run: str = ""
    """The run that wrote it."""
    identity: dict[str, Any] = {}
    """What the parts depend on; see `identity`."""
    options: dict[str, Any] = {}
    """Every option of the run but the secret ones."""
    versions: dict[str, str] = {}
    """Of the installed packages, and of the hook ABI."""
    files: dict[str, int] = {}
    """Every other file of the checkpoint, with its size in bytes."""
    format: int = _FORMAT


def folder_of(run: RunOptions) -> Path:
    """Return where a run saves: `--save`, else a folder of its own run directory."""
    return Path(run.save) if run.save else Path(run.run_dir, "checkpoints")


def holds_checkpoints(folder: Path) -> bool:
    """Say whether a run has saved into this folder."""
    return (folder / LATEST).exists() or any(_numbered(folder))


def names_after(folder: Path, rollout_id: int) -> list[str]:
    """Return the names of a folder's checkpoints of later rollouts, whole or not: what saving would replace."""
    return [path.name for path in _numbered(folder) if _number(path.name) > rollout_id]


def write(folder: Path, state: State, parts: dict[str, Callable[[str], Any]]) -> Path:
    """Write `folder`/rollout_N: each of `parts` fills the subdirectory of its name; then it becomes the latest.

    It is on disk when this returns. When a part fails the folder is as it was before; `DataError` names the path that
    cannot be written.
    """
    target = folder / f"rollout_{state.rollout_id:06d}"
    staging = _aside(target, "staging")
    try:
        for name, fill in parts.items():
            (staging / name).mkdir(parents=True)
            fill(str(staging / name))
        files = dict(_settled(staging))
        _write_file(staging / _STATE, msgspec.json.encode(msgspec.structs.replace(state, files=files)))
        _sync(staging)
        _rename_over(staging, target)
        _write_file(folder / f".{LATEST}", json.dumps({"directory": target.name}).encode())
        (folder / f".{LATEST}").rename(folder / LATEST)
        _sync(folder)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        if isinstance(error, OSError):
            reason = f"{error.filename or staging}: {error.strerror or error}"
            raise DataError(f"the checkpoint cannot be written: {reason}\n{_what_stays(folder, target)}") from error
        if isinstance(error, MilesError):
            error.add_note(_what_stays(folder, target))
        raise
    return target


def find(folder: Path, asked_by: str = "--load") -> tuple[Path, State, list[str]]:
    """Return the latest checkpoint below `folder` (or `folder` itself if it is one), its state, and remarks.

    Where files of the latest are missing it is the newest before it that is complete, and a remark says so. Raises
    `DataError`, which begins with `asked_by`, when there is none, or when `folder` itself is one that is damaged.
    """
    if _NAME.fullmatch(folder.name) or (folder / _STATE).is_file():
        state, damage = _read(folder)
        if state is None:
            raise DataError(f"{asked_by} {folder} is no whole checkpoint: {damage}")
        return folder, state, []
    names = list(_candidates(folder))
    if not names:
        raise DataError(f"{asked_by} {folder} holds no checkpoint: neither {LATEST} nor {_STATE}")
    remarks: list[str] = []
    for name in names:
        state, damage = _read(folder / name)
        if state is not None:
            remarks += [f"the run continues from {name}, the newest checkpoint that is whole"] if remarks else []
            return folder / name, state, remarks
        remarks.append(f"checkpoint {folder / name} is damaged: {damage}")
    raise DataError("\n  ".join([f"{asked_by} {folder} holds no whole checkpoint", *remarks]))


def retain(folder: Path, run: str, limit: int, spare: Path | None = None) -> None:
    """Delete the oldest checkpoints of `run` in `folder`, all but its `limit` newest, and never `spare`.

    Called when a new one is in place. One that the pointer does not name yet, because a save was killed before that,
    counts for nothing: the run does not continue from it. Raises `DataError` for what cannot be deleted.
    """
    own = []
    for path in (folder / name for name in _candidates(folder)):
        state, _ = _read(path)
        if state is not None and state.run == run:
            own.append(path)
    for path in own[limit:]:
        if spare is not None and path.resolve() == spare.resolve():
            continue
        try:
            _remove(path)
        except OSError as error:
            raise DataError(f"--save-total-limit {limit}: {path} cannot be deleted: {error}") from error


def sweep(folder: Path) -> None:
    """Remove what killed saves and deletions left behind; called when no run writes to the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if not _LEFTOVER.fullmatch(path.name):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _candidates(folder: Path) -> Iterator[str]:
    """Yield names of checkpoints: the one that the pointer names, then those before it, newest first."""
    names = [path.name for path in _numbered(folder)][::-1]
    try:
        latest = str(json.loads((folder / LATEST).read_bytes())["directory"])
    except (OSError, ValueError, KeyError, TypeError):
        yield from names
        return
    yield latest
    yield from (name for name in names if _number(name) < _number(latest))


def _numbered(folder: Path) -> list[Path]:
    """Return the checkpoints' directories, oldest first."""
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=lambda path: _number(path.name))


def _number(name: str) -> int:
    found = _NAME.fullmatch(name)
    return int(found[1]) if found else -1


def _read(path: Path) -> tuple[State | None, str]:
    """Return a checkpoint's state, or None and what is wrong with it."""
    try:
        state = msgspec.json.decode((path / _STATE).read_bytes(), type=State)
    except FileNotFoundError:
        return None, f"it has no {_STATE}" if path.is_dir() else "it is not there"
    except (OSError, msgspec.MsgspecError) as error:
        return None, f"{_STATE} cannot be read: {error}"
    if state.format > _FORMAT:
        return None, f"a newer Miles wrote it, in format {state.format}; this one reads up to {_FORMAT}"
    for name, size in state.files.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return None, f"{name} is missing"
        if found != size:
            return None, f"{name} has {found} bytes, not {size}"
    return state, ""


def _what_stays(folder: Path, target: Path) -> str:
    try:
        return f"{target} was not written; {find(folder)[0].name} is still the latest checkpoint in {folder}"
    except DataError:
        return f"{target} was not written; there is no earlier checkpoint in {folder}"


def _settled(staging: Path) -> Iterator[tuple[str, int]]:
    """Bring every file and directory to the disk; yield the files with their sizes."""
    for path in sorted(staging.rglob("*")):
        _sync(path)
        if path.is_file():
            yield str(path.relative_to(staging)), path.stat().st_size


def _write_file(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename_over(staging: Path, target: Path) -> None:
    if target.exists():
        _remove(target, lambda: staging.rename(target))
    else:
        staging.rename(target)
    _sync(target.parent)


def _remove(path: Path, between: Callable[[], Any] = lambda: None) -> None:
    """Delete a checkpoint such that a kill on the way leaves no half of it under its name."""
    aside = _aside(path, "removed")
    path.rename(aside)
    between()
    shutil.rmtree(aside)


def _aside(path: Path, why: str) -> Path:
    # A name of its own: processes of a run that was killed may still write to the one they had.
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.{why}")
