"""Where a run begins: at its own newest checkpoint (`--resume`), at another's (`--load`), or at the beginning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError
from miles_train.driver import checkpoint

if TYPE_CHECKING:
    from miles_api.run_options import RunOptions

__all__ = ["LOCK", "SUMMARY", "Start", "read_summary", "saves_in", "saves_where_it_loads", "start_of"]

SUMMARY = "summary.json"
"""What a run says about itself, in its directory: its id, its outcome, where it saves."""
LOCK = ".lock"
"""Held by the process that writes to a run directory."""


class Start(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint that a run continues from."""

    folder: Path
    """The checkpoint's directory."""
    state: checkpoint.State
    own: bool
    """Whether this very run wrote it, so that its metrics and records go on."""
    remarks: tuple[str, ...] = ()
    """What was wrong with newer checkpoints."""


def start_of(run: RunOptions) -> Start | None:
    """Return the checkpoint that a run continues from, None for a run that begins anew.

    With `--resume` it is the newest of this run; as long as there is none, the run starts as it first did: from
    `--load`, if given. Raises `ConfigError` when the run directory or its checkpoints belong to another run,
    `DataError` for a checkpoint that is missing or damaged.
    """
    own = _own(run) if run.resume else None
    if own is not None or run.load is None:
        return own
    folder, state, remarks = checkpoint.find(Path(run.load))
    return Start(folder=folder, state=state, own=False, remarks=tuple(remarks))


def read_summary(run_dir: Path) -> dict[str, Any]:
    """Return what an earlier start of a run wrote; empty where there is nothing, or nothing that can be read."""
    try:
        found = json.loads((run_dir / SUMMARY).read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def saves_in(run: RunOptions) -> str | None:
    """Return the folder that a run saves in, None where it moves with the run directory."""
    return str(Path(run.save).resolve()) if run.save else None


def saves_where_it_loads(run: RunOptions) -> bool:
    """Say whether a run saves into the folder of checkpoints, or of the checkpoint, that `--load` names."""
    if run.load is None:
        return False
    load = Path(run.load).resolve()
    return checkpoint.folder_of(run).resolve() in (load, load.parent)


def _own(run: RunOptions) -> Start | None:
    summary, folder = read_summary(Path(run.run_dir)), checkpoint.folder_of(run)
    saved = summary.get("save")
    if summary and saved != saves_in(run):
        way_out = f"pass --save {saved}" if saved else "leave --save out"
        raise ConfigError(
            f"--resume: the run in {run.run_dir} saves in {saved or 'its own directory'}, not in {folder}: {way_out}"
        )
    if not checkpoint.holds_checkpoints(folder):
        if summary.get("status") == "finished":
            raise ConfigError(f"--resume: the run in {run.run_dir} is finished and left no checkpoint in {folder}")
        return None
    found, state, remarks = checkpoint.find(folder, "--resume:")
    if state.run != summary.get("id"):
        if saves_where_it_loads(run):
            return None  # it has not saved yet
        raise ConfigError(
            f"--resume: {found} is not a checkpoint of the run in --run-dir {run.run_dir}: choose another --save, or "
            "continue it with --load in a --run-dir of its own"
        )
    return Start(folder=found, state=state, own=True, remarks=tuple(remarks))
