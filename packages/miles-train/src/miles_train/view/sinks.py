"""Where metrics go: `metrics.jsonl` always, TensorBoard and Weights & Biases when asked for."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from miles_api.errors import ConfigError
from miles_train.view.json_lines import JsonLines

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import ModuleType, TracebackType

    from miles_train.options import LoggingOptions

__all__ = ["MetricsWriter", "Sink", "TensorBoardSink", "WandbSink", "check_sinks", "make_sinks"]


class Sink(Protocol):
    """Somewhere else that metrics go."""

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Take one rollout's numbers; called after each rollout and each evaluation."""

    def close(self) -> None:
        """Send what is left; called once."""


class MetricsWriter:
    """Append to `metrics.jsonl`, one JSON object a line, each line written at once; a run that is resumed appends."""

    def __init__(self, path: Path) -> None:
        """Open the file `path` for appending; a new one is created."""
        self._lines = JsonLines(path)

    def write(
        self,
        kind: Literal["rollout", "eval", "run"],
        rollout_id: int,
        metrics: Mapping[str, float],
        seconds: Mapping[str, float],
    ) -> None:
        """Append one line. Raises `DataError` when it cannot be written."""
        self._lines.append(
            {"kind": kind, "rollout_id": rollout_id, "time": time.time(), "metrics": metrics, "seconds": seconds}
        )

    def sync(self) -> None:
        """Return when every line is on the disk."""
        self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        self._lines.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class TensorBoardSink:
    """Write TensorBoard event files through the `tensorboard` package alone: no torch, no TensorFlow.

    A run that is resumed `after` a rollout hides what earlier files of the directory hold of later ones.
    """

    def __init__(self, directory: Path, after: int | None = None) -> None:
        writer = _module("tensorboard.summary.writer.event_file_writer", "--use-tensorboard", "tensorboard")
        events = _module("tensorboard.compat.proto.event_pb2", "--use-tensorboard", "tensorboard")
        self._event = events.Event
        self._summary = _module("tensorboard.compat.proto.summary_pb2", "--use-tensorboard", "tensorboard").Summary
        self._writer = writer.EventFileWriter(str(directory))
        if after is not None:
            start = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=time.time(), step=after + 1, session_log=start))

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Write each metric as a scalar at step `rollout_id`."""
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        event = self._event(wall_time=time.time(), step=rollout_id, summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()


class WandbSink:
    """Log to Weights & Biases. A run that is resumed under its id continues there; W&B keeps what came after."""

    def __init__(self, project: str | None, run_dir: Path, config: Mapping[str, Any], run_id: str | None) -> None:
        wandb = _module("wandb", "--use-wandb", "wandb")
        self._run = wandb.init(
            project=project, name=run_dir.name, dir=str(run_dir), config=dict(config), id=run_id, resume="allow"
        )
        # Evaluations come after their rollout: a step of our own lets both share its number.
        self._run.define_metric("rollout_id")
        self._run.define_metric("*", step_metric="rollout_id")

    def log(self, rollout_id: int, metrics: Mapping[str, float]) -> None:
        """Send each metric, with the rollout as its step."""
        self._run.log({**metrics, "rollout_id": rollout_id})

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()


def check_sinks(options: LoggingOptions) -> None:
    """Raise `ConfigError` if a sink that was asked for cannot work; called before anything starts."""
    if options.use_tensorboard:
        _module("tensorboard.summary.writer.event_file_writer", "--use-tensorboard", "tensorboard")
    if options.use_wandb:
        _module("wandb", "--use-wandb", "wandb")
    elif options.wandb_project is not None:
        raise ConfigError("--wandb-project does nothing without --use-wandb")


def make_sinks(
    options: LoggingOptions,
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    run_id: str | None = None,
    after: int | None = None,
) -> list[Sink]:
    """Return the sinks that were asked for, besides `metrics.jsonl`.

    `config` is what W&B shows as the run's configuration, `run_id` what it knows the run by; `after` is the last
    rollout of the checkpoint that a run is resumed from. Raises `ConfigError` if a package is missing.
    """
    check_sinks(options)
    sinks: list[Sink] = []
    if options.use_tensorboard:
        sinks.append(TensorBoardSink(Path(run_dir) / "tensorboard", after))
    if options.use_wandb:
        sinks.append(WandbSink(options.wandb_project, Path(run_dir), config, run_id))
    return sinks


def _module(name: str, flag: str, package: str) -> ModuleType:
    # Loaded only when asked for: neither package is a dependency of ours.
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise ConfigError(f"{flag} needs the {package} package: pip install {package}") from error
