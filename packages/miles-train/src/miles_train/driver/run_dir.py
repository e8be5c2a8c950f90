"""A run is a directory: config, metrics, samples, hooks, report. This is the only module that writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import secrets
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from miles_api.errors import ConfigError, DataError
from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.driver.start import LOCK, SUMMARY, read_summary, saves_in, start_of
from miles_train.options import LoggingOptions
from miles_train.view.gap_lines import GAPS
from miles_train.view.json_lines import JsonLines, cut_after
from miles_train.view.report import REPORT, write_report
from miles_train.view.sinks import MetricsWriter, make_sinks

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from miles_api.config import RunConfig

__all__ = ["RunDir"]

_ROWS = ("metrics.jsonl", "samples.jsonl", GAPS)
_OTHERS = ("config.toml", "hooks.json", SUMMARY, REPORT)


class RunDir:
    """Writes everything the report is made of; every file is complete after each call.

    What cannot be written is a `DataError` that names the file.
    """

    def __init__(self, config: RunConfig, title: str, notes: list[str]) -> None:
        """Take the directory for this process, and bring it to where the run begins; see `start`.

        A run that resumes itself cuts the rows after its checkpoint; one that begins anew removes those of an earlier
        start. Raises `ConfigError` when another process writes to the directory, or to that of `--save`.
        """
        run = config.group(RunOptions)
        self.path = Path(run.run_dir)
        with self._writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._locks = contextlib.ExitStack()
            self._locks.enter_context(_locked(self.path, "--run-dir"))
            self._take_folder_of_checkpoints(run)
            if run.overwrite:
                _empty(self.path)
            self.start = start_of(run)
            """The checkpoint that the run continues from, None if it begins anew."""
            damaged = self._prepare(run)
        checkpoint.sweep(checkpoint.folder_of(run))
        earlier = read_summary(self.path)
        self.id: str = earlier.get("id") or secrets.token_hex(8)
        """Names the run in its checkpoints; the same for every start of it."""
        # First of all: by it the next start knows a run directory, whatever fails from here on.
        self._summary = {
            "id": self.id,
            "status": "running",
            "title": title,
            "started": earlier.get("started") or time.time(),
            "save": saves_in(run),
            "notes": [*notes, *self._origin(), *damaged],
        }
        self._write_summary()
        # As it is needed to go on: what was overwritten is gone.
        again = config.replace("done", overwrite=False) if run.overwrite else config
        self._replace("config.toml", again.to_toml())
        self._metrics = MetricsWriter(self.path / "metrics.jsonl")
        self._samples = JsonLines(self.path / "samples.jsonl")
        self._gaps = JsonLines(self.path / GAPS)
        own = self.start is not None and self.start.own
        after = self.start.state.rollout_id if self.start and own else -1 if run.resume else None
        self._sinks = make_sinks(config.group(LoggingOptions), self.path, config.public(), run_id=self.id, after=after)

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
        self._samples.append({"kind": kind, "rollout_id": rollout_id, "samples": samples})

    def token_gaps(self, rollout_id: int, gaps: dict[str, Any]) -> None:
        """Append where trainer and engines disagreed about a rollout's tokens, if that is known."""
        if gaps:
            self._gaps.append({"kind": "rollout", "rollout_id": rollout_id, **gaps})

    def hooks(self, reports: Mapping[str, list[dict[str, Any]]]) -> None:
        """Write which hooks each process has, from where, and how they fared since the run was started or resumed."""
        lines = [{"process": process, **hook} for process, hooks in reports.items() for hook in hooks]
        self._replace("hooks.json", json.dumps(lines, indent=2))

    def sync(self) -> None:
        """Return when every row is on the disk: a checkpoint must not outlive what led to it."""
        self._metrics.sync()
        self._samples.sync()
        self._gaps.sync()

    def close(self, status: str, error: str | None = None, exit_code: int = 0) -> Path:
        """Close the files, write the outcome and the report; return the report's path.

        Raises `DataError` when they cannot be written; for a run that failed that is only said, so that it hides
        nothing.
        """
        self._summary |= {"status": status, "finished": time.time(), "exit_code": exit_code}
        self._summary |= {"error": error} if error else {}
        self._metrics.close()
        self._samples.close()
        self._gaps.close()
        try:
            self._write_summary()
            with self._writing(self.path / REPORT):
                write_report(self.path)
        except DataError as problem:
            if error is None:
                raise
            print(f"miles train: {problem}", file=sys.stderr)
        finally:
            # Last: what needs a network may fail, or take its time.
            with self._locks:
                for sink in self._sinks:
                    sink.close()
        return self.path / REPORT

    def _take_folder_of_checkpoints(self, run: RunOptions) -> None:
        folder = checkpoint.folder_of(run)
        if folder.resolve().is_relative_to(self.path.resolve()):
            return
        with self._writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            self._locks.enter_context(_locked(folder, "--save"))

    def _prepare(self, run: RunOptions) -> list[str]:
        """Bring the files to where the run begins; return which rows were lost to damage, which is printed too."""
        found = []
        if self.start is not None and self.start.own:
            for name in _ROWS:
                damaged = cut_after(self.path / name, self.start.state.rollout_id)
                if damaged:
                    found.append(f"{name}: {damaged} damaged {'line was' if damaged == 1 else 'lines were'} taken out")
                    print(f"miles train: {self.path}: {found[-1]}", file=sys.stderr)
        elif run.resume:
            for name in (*_ROWS, *_OTHERS):
                (self.path / name).unlink(missing_ok=True)
        return found

    def _origin(self) -> list[str]:
        if self.start is None:
            return []
        return [f"continued after rollout {self.start.state.rollout_id}, from {self.start.folder}"]

    def _write_summary(self) -> None:
        self._replace(SUMMARY, json.dumps(self._summary, indent=2))

    def _replace(self, name: str, text: str) -> None:
        """Write a file such that a kill leaves the old one or the new one."""
        aside = self.path / f".{name}"
        with self._writing(self.path / name):
            try:
                aside.write_text(text, encoding="utf-8")
                aside.replace(self.path / name)
            except OSError:
                aside.unlink(missing_ok=True)
                raise

    @staticmethod
    @contextlib.contextmanager
    def _writing(path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}") from error


def _locked(folder: Path, flag: str) -> BinaryIO:
    """Take a directory for this process: held until the file is closed, or the process is gone."""
    file = (folder / LOCK).open("ab")
    try:
        # A lock of the process, which its children do not inherit.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ConfigError(f"{flag} {folder} is being written by another run that still goes on") from error
    return file


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
