"""Read a run directory, whatever state a run left it in.

A run that died leaves half a line behind, one that is resumed repeats rollouts, one that failed early has no metrics
at all. Nothing here raises for that: what can be read is returned, and what cannot is said in `problems`.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_train.view.gap_lines import GAPS, GapLine, read_gaps

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Record", "RunDirectory", "read_run"]

PHASES = ("generate", "convert", "train", "weight_sync", "eval", "other")


class Record(msgspec.Struct):
    """One line of `metrics.jsonl`."""

    kind: str
    """`rollout`, `eval` or `run`."""
    rollout_id: int
    time: float | None
    """Unix seconds at which the line was written."""
    metrics: dict[str, float | None]
    """Numbers by name; None where the run wrote something that is not finite."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase."""


class RunDirectory(msgspec.Struct):
    """What could be read of a run."""

    path: Path
    summary: dict[str, Any]
    """`summary.json`, empty where there is none."""
    startup: dict[str, float]
    """Seconds of each start-up phase."""
    rollouts: list[Record]
    """One record a rollout, by id; of a rollout done twice (a resumed run) the later one."""
    evals: list[Record]
    """One record for each evaluated rollout, by id; datasets evaluated in several lines are merged."""
    gaps: list[GapLine]
    """One line a rollout of how far trainer and engines were apart on its tokens."""
    hooks: list[dict[str, Any]]
    config: str
    """The text of `config.toml`."""
    problems: list[str]
    """What was missing or could not be read, in words."""

    @property
    def started(self) -> float | None:
        """Unix time of the start: the summary's, else that of the first line."""
        said = _unix(self.summary.get("started"))
        return min(self._times(), default=None) if said is None else said

    @property
    def finished(self) -> float | None:
        """Unix time of the end: the summary's, else that of the last line."""
        said = _unix(self.summary.get("finished"))
        return max(self._times(), default=None) if said is None else said

    def _times(self) -> list[float]:
        return [record.time for record in (*self.rollouts, *self.evals) if record.time is not None]


def read_run(path: Path) -> RunDirectory:
    """Read every file of a run but its samples."""
    problems: list[str] = []
    summary = _read_json(path / "summary.json", dict, problems)
    # A run that goes on has not written its hooks yet: that is no problem.
    told = [] if summary.get("status") == "running" else problems
    hooks = [hook for hook in _read_json(path / "hooks.json", list, told) if isinstance(hook, dict)]
    config = _read_text(path / "config.toml", problems)
    rollouts: dict[int, Record] = {}
    evals: dict[int, Record] = {}
    startup: dict[str, float] = {}
    for record in _records(path / "metrics.jsonl", problems):
        if record.kind == "run":
            startup = {name: value for name, value in record.seconds.items() if name != "total"}
        elif record.kind == "rollout":
            rollouts[record.rollout_id] = record
        elif record.kind == "eval":
            before = evals.get(record.rollout_id)
            if before:
                record.metrics = {**before.metrics, **record.metrics}
            evals[record.rollout_id] = record
    _move_eval_seconds(evals, rollouts, startup)
    in_order = [[records[key] for key in sorted(records)] for records in (rollouts, evals)]
    gaps = read_gaps(path / GAPS, problems)
    return RunDirectory(path, summary, startup, in_order[0], in_order[1], gaps, hooks, config, problems)


def _move_eval_seconds(evals: dict[int, Record], rollouts: dict[int, Record], startup: dict[str, float]) -> None:
    """Count the time of an evaluation in the rollout it followed, or in the start-up if it came before all."""
    for rollout_id, record in evals.items():
        seconds = record.seconds.get("eval", 0.0)
        rollout = rollouts.get(rollout_id)
        if rollout is not None and "eval" not in rollout.seconds:
            rollout.seconds["eval"] = seconds
            if "total" in rollout.seconds:
                rollout.seconds["total"] += seconds
        elif rollout is None and seconds and rollout_id < min(rollouts, default=0):
            startup["first evaluation"] = seconds


def _records(path: Path, problems: list[str]) -> Iterator[Record]:
    if not path.is_file():
        problems.append(f"{path.name} is missing")
        return
    broken = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.strip():
                continue
            record = _record(line)
            if record is None:
                broken += 1
            else:
                yield record
    if broken:
        problems.append(f"{path.name}: {broken} line{'s' if broken > 1 else ''} could not be read")


def _record(line: bytes) -> Record | None:
    try:
        raw = json.loads(line)
        kind, rollout_id = str(raw["kind"]), int(raw.get("rollout_id") or 0)
        metrics = {str(name): _finite(value) for name, value in (raw.get("metrics") or {}).items()}
        seconds = {str(name): _finite(value) or 0.0 for name, value in (raw.get("seconds") or {}).items()}
        return Record(kind, rollout_id, _finite(raw.get("time")), metrics, seconds)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _finite(value: object) -> float | None:
    if not isinstance(value, int | float):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def _read_text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError as error:
        problems.append(f"{path.name} is missing" if not path.exists() else f"{path.name}: {error.strerror}")
        return ""


def _read_json(path: Path, kind: type, problems: list[str]) -> Any:
    text = _read_text(path, problems)
    if not text:
        return kind()
    try:
        value = json.loads(text)
    except ValueError as error:
        problems.append(f"{path.name} could not be read: {error}")
        return kind()
    if isinstance(value, kind):
        return value
    problems.append(f"{path.name} does not hold a {'table' if kind is dict else 'list'}")
    return kind()


def _unix(value: object) -> float | None:
    """Return Unix seconds of a number or of an ISO 8601 string."""
    if isinstance(value, str):
        try:
            return datetime.datetime.fromisoformat(value).timestamp()
        except ValueError:
            return None
    return _finite(value)
