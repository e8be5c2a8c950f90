"""The directory of a run: what was asked, what was loaded, what was measured."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from miles_api.run_options import RunOptions
from miles_train.options import LoggingOptions
from miles_train.view.report import write_report
from miles_train.view.sinks import MetricsWriter, make_sinks

if TYPE_CHECKING:
    from collections.abc import Mapping

    from miles_api.config import RunConfig

__all__ = ["RunDir"]


class RunDir:
    """Writes everything the report is made of; every file is complete after each call."""

    def __init__(self, config: RunConfig, title: str, notes: list[str]) -> None:
        self.path = Path(config.group(RunOptions).run_dir)
        if self.path.is_dir() and config.group(RunOptions).overwrite:
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        self._metrics = MetricsWriter(self.path / "metrics.jsonl")
        self._samples = (self.path / "samples.jsonl").open("ab")
        self._sinks = make_sinks(config.group(LoggingOptions), self.path, config.public())
        self._summary = {"status": "running", "title": title, "started": time.time(), "notes": notes}
        self._write_summary()

    def log(
        self,
        kind: Literal["run", "rollout", "eval"],
        rollout_id: int,
        metrics: dict[str, float],
        seconds: dict[str, float],
    ) -> None:
        """Append one line to metrics.jsonl and feed the other sinks."""
        self._metrics.write(kind, rollout_id, metrics, seconds)
        for sink in self._sinks:
            sink.log(rollout_id, {**metrics, **{f"seconds/{phase}": value for phase, value in seconds.items()}})

    def samples(self, kind: str, rollout_id: int, samples: list[dict[str, Any]]) -> None:
        """Append what the report's sample browser shows."""
        line = msgspec.json.encode({"kind": kind, "rollout_id": rollout_id, "samples": samples})
        self._samples.write(line + b"\n")
        self._samples.flush()

    def hooks(self, reports: Mapping[str, list[dict[str, Any]]]) -> None:
        """Write which hooks each process has, from where, and how they fared so far."""
        lines = [{"process": process, **hook} for process, hooks in reports.items() for hook in hooks]
        (self.path / "hooks.json").write_text(json.dumps(lines, indent=2), encoding="utf-8")

    def close(self, status: str, error: str | None = None) -> Path:
        """Close the files, write the outcome and the report; return the report's path."""
        self._summary |= {"status": status, "finished": time.time()} | ({"error": error} if error else {})
        self._write_summary()
        self._metrics.close()
        self._samples.close()
        for sink in self._sinks:
            sink.close()
        return write_report(self.path)

    def _write_summary(self) -> None:
        (self.path / "summary.json").write_text(json.dumps(self._summary, indent=2), encoding="utf-8")
