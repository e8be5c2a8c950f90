"""One checked run from start to report: the signals, the failures, the outcome."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api import stacks
from miles_api.errors import ConfigError, MilesError
from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.driver.hook_watch import HookWatch
from miles_train.driver.interrupts import Interrupts
from miles_train.driver.run_dir import RunDir
from miles_train.driver.services import running
from miles_train.driver.start import start_of
from miles_train.driver.train_loop import TrainLoop
from miles_train.view.progress import Progress

if TYPE_CHECKING:
    from miles_api.checks.check import CheckReport

__all__ = ["train"]

_PATIENCE = 5.0
"""Seconds in which a process of a failed run may say how its hooks fared."""


def train(report: CheckReport) -> int:
    """Start everything, train, write the report; return the exit code.

    It is 0 when trained and 1 when the run failed; 130 and 143 when SIGINT or SIGTERM ended it.
    """
    if report.config is None:
        raise ConfigError("a run whose words could not be read cannot start")
    run = report.config.group(RunOptions)
    # From here on a signal only ends the run where nothing is left behind.
    with Interrupts() as interrupts:
        run_dir = RunDir(report.config, f"{Path(run.run_dir).name}: {run.loss_type}", report.notes)
        with stacks.kept_in(run_dir.path / "stacks"):
            stacks.register("driver")
            problem = _problem_of(report, run_dir, interrupts)
        status, code = "finished", 0
        if problem is not None:
            status, code = ("failed", 1) if interrupts.exit_code is None else ("interrupted", interrupts.exit_code)
            problem = f"{problem}\n{_way_on(run)}"
        try:
            written = run_dir.close(status, problem, code)
        except MilesError as error:
            # The run is trained and nobody can read what of it: that is no success.
            print(f"miles train: {error}", file=sys.stderr)
            return 1
        if problem:
            print(f"miles train: the run {'failed' if code == 1 else 'was interrupted'}\n{problem}", file=sys.stderr)
        print(f"report: {written}")
    return code


def _problem_of(report: CheckReport, run_dir: RunDir, interrupts: Interrupts) -> str | None:
    """Run, and return in words what ended it early."""
    try:
        _run(report, run_dir, interrupts)
    except MilesError as error:
        problem = "\n".join([str(error), *getattr(error, "__notes__", [])])
    except KeyboardInterrupt:
        return f"interrupted by {interrupts.name}"
    except Exception:
        # Not one of ours: the whole traceback is the message, in the report as on the screen.
        problem = traceback.format_exc()
    else:
        return None
    # A scheduler that ends a run may signal all of its processes: what then fails is not what happened.
    return problem if interrupts.name is None else f"interrupted by {interrupts.name}; then: {problem}"


def _run(report: CheckReport, run_dir: RunDir, interrupts: Interrupts) -> None:
    config = report.config
    assert config is not None
    with (
        Progress(config.group(RunOptions).num_rollout) as progress,
        running(config, lambda what: progress.phase(what, None), progress.note, interrupts.check) as services,
    ):
        run_dir.log("run", -1, {}, services.seconds)
        watch = HookWatch(report, services, run_dir, progress.note)
        try:
            with interrupts.raising():
                TrainLoop(config, services, run_dir, progress, watch).run()
        except MilesError:
            watch.collect(_PATIENCE)
            raise


def _way_on(run: RunOptions) -> str:
    """Say from which checkpoint the run can go on, and by which command."""
    try:
        start = start_of(msgspec.structs.replace(run, resume=True, load=None))
    except MilesError:
        start = None
    if start is None:
        return f"it has left no checkpoint in {checkpoint.folder_of(run)} yet: it can only begin anew"
    words = ["miles", "train", str(Path(run.run_dir, "config.toml")), "--resume"]
    # The two exclude each other.
    words += ["--no-overwrite"] if run.overwrite else []
    return f"it can go on after rollout {start.state.rollout_id}, from {start.folder}:\n  {shlex.join(words)}"
