"""What a trainer rank does with one rollout: columns, old log-probs, advantages, optimizer steps, metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles_api.errors import ConfigError
from miles_api.run_options import RunOptions
from miles_api.services import TrainStepReport
from miles_train.columns import shard_columns, take_share, validate_columns
from miles_train.guards import check_finite
from miles_train.hook_calls import call_postprocess
from miles_train.megatron import init
from miles_train.metrics import Metrics, PhaseClock
from miles_train.objective import (
    Plan,
    Step,
    add_loss_metrics,
    check_policy_columns,
    logprob_gap,
    pieces_of,
    plan_steps,
    report_metrics,
    samples_that_pull,
)
from miles_train.options import ObjectiveOptions
from miles_train.passes import Passes
from miles_train.seen import check_seen
from miles_train.train_hooks import reads_log_probs, recomputes_log_probs

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_train.megatron.core import DistributedDataParallel
    from miles_train.megatron.optimizer import Optimizer
    from miles_train.train_hooks import TrainHooks
    from miles_train.train_record import TrainRecorder

__all__ = ["Learner"]


class Learner:
    """The objective of a run, applied to one rollout after another."""

    def __init__(self, config: RunConfig, hooks: TrainHooks, recorder: TrainRecorder) -> None:
        """Read the options; `recorder` gets the columns as they are trained on.

        The batch sizes in `config` must all be derived. Raises `ConfigError` for an objective that contradicts itself.
        """
        self._run = config.group(RunOptions)
        self._objective = config.group(ObjectiveOptions)
        if self._run.num_steps_per_rollout is None:
            raise ConfigError("--num-steps-per-rollout was not derived before the trainer was built")
        self.num_steps = self._run.num_steps_per_rollout
        self._hooks, self._recorder = hooks, recorder
        self._pieces = pieces_of(config, hooks)
        self._passes = Passes(config, self._pieces, hooks)
        self._recompute = recomputes_log_probs(config)
        self._recompute_first = reads_log_probs(config)
        self._model: list[DistributedDataParallel] = []
        self._optimizer: Any = None

    def attach(self, model: list[DistributedDataParallel], optimizer: Optimizer | None) -> None:
        """Set what is trained from now on."""
        self._model, self._optimizer = model, optimizer

    def train(self, rollout_id: int, batch: dict[str, Any]) -> TrainStepReport:
        """Take the optimizer steps of one rollout, as `Trainer.train` describes them."""
        clock, metrics = PhaseClock(), Metrics()
        with self._hooks.during(f" in rollout {rollout_id}"):
            with clock.phase("data"):
                data, shares = self._load_batch(batch)
            data |= self._first_log_probs(data, metrics, clock)
            with clock.phase("advantages"):
                self._finish_columns(rollout_id, data)
                plan = self._plan(data, shares)
            later = data | self._later_log_probs(data, plan, metrics, clock)
            trained = self.num_steps - plan.steps_skipped
            for step in plan.steps:
                with self._hooks.during(f", step {step.number}"):
                    self._train_step(rollout_id, step, plan, later if step.number else data, metrics, clock)
        with clock.phase("metrics"):
            numbers = metrics.gather(contribute=init.is_reporting_rank(), device=init.device())
            numbers |= {"samples_skipped": plan.samples_skipped, "skipped_steps": plan.steps_skipped}
        return TrainStepReport(metrics=report_metrics(numbers, trained), seconds=clock.seconds)

    def _load_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return this rank's samples as tensors, and for each step their positions among them."""
        columns = validate_columns(batch)
        columns.setdefault("sample_indices", list(range(len(columns["tokens"]))))
        if self._has_advantages(columns):
            check_policy_columns(columns, self._objective, rewards=self._hooks.one("advantage") is None)
            columns = self._pieces.baselines(columns)
        shards = shard_columns(columns, data_parallel_size=init.data_parallel_size(), num_steps=self.num_steps)
        data, shares = take_share(columns, shards[init.data_parallel_rank()], init.device())
        if "rollout_log_probs" in data:
            values = torch.cat(data["rollout_log_probs"])
            check_finite("rollout_log_probs", values, data["response_lengths"], data["sample_indices"])
        return data, shares

    def _has_advantages(self, columns: dict[str, Any]) -> bool:
        """Say whether this rollout gets advantages and old log-probs: a custom loss may train on data without rewards,
        as supervised training does."""
        if self._run.loss_type == "custom_loss" and self._hooks.one("advantage") is None:
            return "rewards" in columns
        return self._pieces.advantage is not None

    def _first_log_probs(self, data: dict[str, Any], metrics: Metrics, clock: PhaseClock) -> dict[str, Any]:
        """Return the column `log_probs` where it must be whole before anything else is computed."""
        if not self._has_advantages(data):
            return {}
        if self._objective.use_rollout_logprobs:
            return {"log_probs": list(data["rollout_log_probs"])}
        if not (self._recompute and self._recompute_first):
            return {}
        with clock.phase("log_probs"):
            return self._passes.old_log_probs(self._model, data, range(len(data["tokens"])), metrics)

    def _later_log_probs(self, data: dict[str, Any], plan: Plan, metrics: Metrics, clock: PhaseClock) -> dict[str, Any]:
        """Return the column `log_probs` for the samples of later steps, where it is not there yet.

        The first step runs on the weights of the old log-probs: there the loss detaches its own.
        """
        positions = [i for step in plan.steps[1:] for i in step.positions]
        if self._recompute and not self._recompute_first and positions:
            with clock.phase("log_probs"):
                return self._passes.old_log_probs(self._model, data, positions, metrics)
        if not (self._recompute and self._recompute_first and self._has_advantages(data)):
            self._hooks.skip("before_log_prob")
        return {}

    def _finish_columns(self, rollout_id: int, data: dict[str, Any]) -> None:
        """Set advantages, let hooks change the columns, normalise, record.

        Hooks run on the last pipeline stage only; what other stages need of their result, `_plan` tells them.
        """
        hooks, last, advantage = self._hooks, init.is_last_stage(), self._pieces.advantage
        if not (self._has_advantages(data) and (last or not self._pieces.late_columns)):
            advantage = None
        if advantage is not None:
            advantage(data)
            values = torch.cat(data["advantages"])
            check_finite("advantages", values, data["response_lengths"], data["sample_indices"], hooks.where)
        if last:
            call_postprocess(hooks, rollout_id, data)
        if advantage is not None and self._pieces.normalise is not None:
            self._pieces.normalise(data)
        if init.is_reporting_rank() and init.data_parallel_rank() == 0:
            self._recorder.write(rollout_id, data)

    def _plan(self, data: dict[str, Any], shares: list[list[int]]) -> Plan:
        """Choose what runs; all ranks come to the same plan."""
        running = [True] * len(data["tokens"])
        if self._pieces.skips:
            knows = init.is_last_stage() or not self._pieces.late_columns
            running = samples_that_pull(data) if knows else running
            running = init.from_last_stage(running) if self._pieces.late_columns else running
        return plan_steps(
            data,
            shares,
            running,
            per_token=self._objective.calculate_per_token_loss,
            sum_over_ranks=_sum_over_ranks,
        )

    def _train_step(
        self, rollout_id: int, step: Step, plan: Plan, data: dict[str, Any], metrics: Metrics, clock: PhaseClock
    ) -> None:
        """Take one optimizer step, if anything runs in it; metrics average over the rollout's steps that run."""
        hooks = self._hooks
        if not step.positions:
            hooks.skip("before_train_step", "loss", "importance_weights", "pg_loss_reducer")
            return
        scheduler = self._optimizer.scheduler
        hooks.call_each(
            "before_train_step", hooks.args, rollout_id, step.number, self._model, self._optimizer.inner, scheduler
        )
        with clock.phase("forward_backward"):
            results, seen, micro_batches = self._passes.forward_backward(self._model, step, data)
        with clock.phase("guards"):
            check_seen(seen, hooks.where, self._pieces.loss_name)
            # Steps that train nothing leave the weights as they were: what matters is the first that trains.
            fresh = not any(earlier.positions for earlier in plan.steps[: step.number])
            if fresh and not (self._recompute and "log_probs" in data):
                # These samples' only pass on the weights that generated them.
                for one in seen:
                    metrics.add_all(logprob_gap(one.log_probs_R, one.batch))
        with clock.phase("optimizer"):
            rate = self._optimizer.learning_rate
            _, grad_norm = self._optimizer.step()
        weight = 1.0 / (self.num_steps - plan.steps_skipped)
        add_loss_metrics(metrics, results, step, loss_weight=1.0 / self.num_steps, weight=weight)
        share = weight / init.data_parallel_size()
        metrics.add("grad_norm", grad_norm * share)
        metrics.add("lr", rate * share)
        metrics.add("tokens", float(sum(data["total_lengths"][i] for i in step.positions)))
        metrics.add("micro_batches", float(micro_batches))


def _sum_over_ranks(counts: list[list[float]]) -> list[list[float]]:
    if dist.get_world_size() == 1:
        return counts
    packed = torch.tensor(counts, dtype=torch.float64, device=init.device())
    dist.all_reduce(packed if init.is_reporting_rank() else packed.zero_())
    return packed.tolist()
