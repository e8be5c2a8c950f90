"""One checked run from start to report: the signals, the failures, the outcome."""

from __future__ import annotations

import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from miles_api.errors import ConfigError, MilesError
from miles_api.run_options import RunOptions
from miles_train.driver.hook_watch import HookWatch
from miles_train.driver.run_dir import RunDir
from miles_train.driver.services import running
from miles_train.driver.train_loop import TrainLoop
from miles_train.view.progress import Progress

if TYPE_CHECKING:
    from types import FrameType

    from miles_api.checks.check import CheckReport

__all__ = ["train"]

_PATIENCE = 5.0
"""Seconds in which a process of a failed run may say how its hooks fared."""


def train(report: CheckReport) -> int:
    """Start everything, train, write the report; return 0 when trained and 1 when the run failed."""
    if report.config is None:
        raise ConfigError("a run whose words could not be read cannot start")
    config, run = report.config, report.config.group(RunOptions)
    run_dir = RunDir(config, f"{Path(run.run_dir).name}: {run.loss_type}", report.notes)
    signal.signal(signal.SIGTERM, _terminated)
    status, problem = "failed", None
    try:
        with (
            Progress(run.num_rollout) as progress,
            running(config, lambda what: progress.phase(what, None)) as services,
        ):
            run_dir.log("run", -1, {}, services.seconds)
            watch = HookWatch(report, services, run_dir, progress.note)
            try:
                TrainLoop(config, services, run_dir, progress, watch).run()
            except MilesError:
                watch.collect(_PATIENCE)
                raise
        status = "finished"
    except MilesError as error:
        problem = "\n".join([str(error), *getattr(error, "__notes__", [])])
    except KeyboardInterrupt:
        problem = "interrupted"
    except Exception:
        # Not one of ours: the whole traceback is the message, in the report as on the screen.
        problem = traceback.format_exc()
    written = run_dir.close(status, problem)
    if problem:
        print(f"miles train: the run failed\n{problem}", file=sys.stderr)
    print(f"report: {written}")
    return 0 if status == "finished" else 1


def _terminated(_signum: int, _frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt
