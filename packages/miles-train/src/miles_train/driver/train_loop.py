"""The loop: rollout → train → weights → log, and now and then evaluate and save.

Schedules are policies of it: `Rollouts` says when a rollout is made, `Turns` who has the memory meanwhile.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import DataError
from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.driver.identity import identity_of, options_of, versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.config import RunConfig
    from miles_api.services import TrainStepReport
    from miles_train.driver.hook_watch import HookWatch
    from miles_train.driver.run_dir import RunDir
    from miles_train.driver.services import Services
    from miles_train.view.progress import Progress

__all__ = ["TrainLoop"]


class TrainLoop:
    """One run over started services."""

    def __init__(
        self, config: RunConfig, services: Services, run_dir: RunDir, progress: Progress, watch: HookWatch
    ) -> None:
        self._run = config.group(RunOptions)
        self._evaluates = services.sync is not None and self._run.eval_interval is not None
        self._services = services
        self._rollouts = services.rollouts
        self._turns = services.turns
        self._run_dir = run_dir
        self._progress = progress
        self._watch = watch
        self._start = run_dir.start
        self._version = 0
        self._first = 0
        self._synced: dict[str, float] = {}
        """What the last check of pushed weights found, until a row of metrics holds it."""
        self._about_run = {
            "run": run_dir.id,
            "identity": identity_of(config) if services.trainers else {},
            "options": options_of(config),
            "versions": versions(),
        }

    def run(self) -> None:
        """Train every rollout, from the beginning or from a checkpoint; the last state is saved."""
        self._watch.started()
        self._load()
        self._turns.to_engines(self._push_weights)
        if self._start and self._start.own:
            # Before it saved these weights the run had pushed them, and evaluated them if that was due: no row of
            # metrics tells of it twice.
            self._synced = {}
            # It may have been killed between a save and this.
            self._retain()
        elif self._evaluates:
            self._evaluate(self._first - 1)
        for rollout_id in range(self._first, self._run.num_rollout):
            self._one(rollout_id)
        self._export()
        self._watch.collect()

    def _one(self, rollout_id: int) -> None:
        started = time.perf_counter()
        self._progress.phase("rollout", rollout_id)
        rollout = self._rollouts.take(rollout_id, self._version, self._weights)
        # Ahead of training, if the schedule is one step off; the next three lines then go on at the same time.
        self._rollouts.begin(rollout_id + 1, self._version, self._weights, saves=self._saves_after(rollout_id))
        self._turns.to_trainer()
        trained = self._train(rollout_id, rollout.batch)
        self._rollouts.settle()
        self._progress.phase("weight sync", rollout_id)
        synced = time.perf_counter()
        metrics, seconds = self._rollouts.row(rollout, self._version)
        self._version += 1
        self._turns.to_engines(self._push_weights)
        finished = time.perf_counter()
        seconds |= {
            "train": sum(trained.seconds.values()) if trained else 0.0,
            "weight_sync": finished - synced if self._services.sync else 0.0,
        }
        seconds |= {"other": finished - started - sum(seconds.values()), "total": finished - started}
        metrics |= {**(trained.metrics if trained else {}), **self._synced, **self._turns.spent()}
        metrics |= self._services.restarts()
        self._synced = {}
        self._run_dir.log("rollout", rollout_id, metrics, seconds)
        self._run_dir.samples("train", rollout_id, rollout.said["samples"])
        self._run_dir.token_gaps(rollout_id, trained.token_gaps if trained else {})
        self._watch.rollout(rollout.said["hooks"])
        self._progress.rollout(rollout_id, metrics, seconds)
        self._watch.after("rollout")
        last = rollout_id == self._run.num_rollout - 1
        if self._evaluates and (last or self._is_due(rollout_id, self._run.eval_interval)):
            self._evaluate(rollout_id)
        if self._saves_after(rollout_id):
            self._save(rollout_id)

    def _saves_after(self, rollout_id: int) -> bool:
        return rollout_id == self._run.num_rollout - 1 or self._is_due(rollout_id, self._run.save_interval)

    @staticmethod
    def _is_due(rollout_id: int, interval: int | None) -> bool:
        return interval is not None and (rollout_id + 1) % interval == 0

    @property
    def _weights(self) -> str:
        """The version that engines report for the weights they serve now."""
        sync = self._services.sync
        return sync.served(self._version) if sync else str(self._version)

    def _train(self, rollout_id: int, batch: Any) -> TrainStepReport | None:
        if self._services.trainers is None:
            return None
        self._progress.phase("train", rollout_id)
        return self._services.trainers.call("train", rollout_id, batch)[0]

    def _push_weights(self) -> None:
        if self._services.sync:
            self._synced |= self._services.sync.push(self._version)
        if self._services.supervisor:
            self._services.supervisor.require_weights(self._weights)

    def _evaluate(self, rollout_id: int) -> None:
        self._progress.phase("evaluate", rollout_id)
        started = time.perf_counter()
        result = self._services.rollout.call("evaluate", rollout_id, self._weights)[0]
        self._run_dir.log("eval", rollout_id, result["metrics"], {"eval": time.perf_counter() - started})
        self._run_dir.samples("eval", rollout_id, result["samples"])
        self._watch.rollout(result["hooks"])
        self._progress.eval(result["metrics"])
        self._watch.after("eval")

    def _save(self, rollout_id: int) -> None:
        """Write a checkpoint, tell every trainer rank when it lies in its place, and delete those beyond the limit."""
        trainers = self._services.trainers
        if trainers is None:
            return
        self._progress.phase("save", rollout_id)
        self._run_dir.sync()
        parts: dict[str, Callable[[str], Any]] = {
            "trainer": lambda folder: trainers.call("save", rollout_id, folder),
            "rollout": lambda folder: self._rollouts.save(rollout_id, folder),
            "hf": lambda folder: trainers.call("export", folder),
        }
        state = checkpoint.State(rollout_id=rollout_id, weight_version=self._version, **self._about_run)
        with self._turns.borrowed():
            written = checkpoint.write(checkpoint.folder_of(self._run), state, parts)
            trainers.call("saved", rollout_id, str(written), str(written / "hf"))
        self._watch.after("save")
        self._retain()

    def _retain(self) -> None:
        """Delete this run's checkpoints beyond the limit."""
        if self._run.save_total_limit is not None:
            # A run that is started again with the same --load needs it again.
            loaded = self._start.folder if self._start and not self._start.own else None
            folder = checkpoint.folder_of(self._run)
            checkpoint.retain(folder, self._run_dir.id, self._run.save_total_limit, spare=loaded)

    def _export(self) -> None:
        if self._run.save_hf and self._services.trainers:
            try:
                Path(self._run.save_hf).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise DataError(f"--save-hf {self._run.save_hf} cannot be created: {error}") from error
            with self._turns.borrowed():
                self._services.trainers.call("export", self._run.save_hf)

    def _load(self) -> None:
        start, trainers = self._start, self._services.trainers
        if start is None or trainers is None:
            return
        rollout_id = start.state.rollout_id
        trainers.call("load", rollout_id, str(start.folder / "trainer"))
        self._services.rollout.call("load", rollout_id, str(start.folder / "rollout"))
        self._first, self._version = rollout_id + 1, start.state.weight_version
