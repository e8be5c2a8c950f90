"""What a trainer rank does with one rollout: columns, old log-probs, advantages, optimizer steps, metrics."""

from __future__ import annotations

from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from miles_api.errors import ConfigError, SampleError
from miles_api.run_options import RunOptions
from miles_api.services import TrainStepReport
from miles_train.advantages import advantage_metrics
from miles_train.columns import PER_RESPONSE_TOKEN, shard_columns, take_share, validate_columns
from miles_train.critic_steps import critic_step, finish_explained_variance, value_errors
from miles_train.guards import check_columns
from miles_train.hook_calls import call_postprocess
from miles_train.megatron import init
from miles_train.megatron.attention import count_slots
from miles_train.metrics import Metrics, PhaseClock
from miles_train.mismatch import compare
from miles_train.model_columns import model_columns
from miles_train.models_check import has_teacher
from miles_train.needs import needs_old_log_probs_first
from miles_train.objective import (
    Plan,
    Step,
    add_loss_metrics,
    check_policy_columns,
    pieces_of,
    plan_steps,
    report_metrics,
    samples_that_pull,
)
from miles_train.options import BatchingOptions, ModelsOptions, ObjectiveOptions
from miles_train.passes import Passes
from miles_train.seen import check_seen
from miles_train.siblings import number_rollouts, sum_rollout_masks
from miles_train.train_hooks import origin_of_columns, reads_log_probs, recomputes_log_probs
from miles_train.work import WorkMeter
from miles_train.zero_gradient import note_skipped_steps, note_zero_gradient

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_train.models import Models
    from miles_train.siblings import Siblings
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
        self._balance = config.group(BatchingOptions).balance_data
        self._work = WorkMeter(config)
        self._origin = origin_of_columns(config)
        self._recompute = recomputes_log_probs(config)
        self._recompute_first = reads_log_probs(config)
        self._critic_alone = config.group(ModelsOptions).num_critic_only_steps
        if self._run.loss_type == "value_loss":
            self._critic_alone = self._run.num_rollout
        self._teacher_here = has_teacher(config)
        self._models: Any = None

    def attach(self, models: Models | None) -> None:
        """Set what is trained, and what is read, from now on."""
        self._models = models

    def train(self, rollout_id: int, batch: dict[str, Any]) -> TrainStepReport:
        """Take the optimizer steps of one rollout, as `Trainer.train` describes them."""
        clock, metrics = PhaseClock(), Metrics()
        with self._hooks.during(f" in rollout {rollout_id}"):
            with clock.phase("data"):
                data, shares, siblings = self._load_batch(batch)
            data |= self._model_columns(data, metrics, clock)
            with clock.phase("advantages"):
                self._finish_columns(rollout_id, data, metrics)
                sum_rollout_masks(data, siblings, _sum_over_ranks)
                plan, critic_plan = self._plans(rollout_id, data, shares, siblings)
                critic_alone = rollout_id < self._critic_alone
                if not critic_alone:
                    note_skipped_steps(metrics, plan.steps, data, shares)
            later = data | self._later_log_probs(data, plan, metrics, clock)
            for step in plan.steps:
                with self._hooks.during(f", step {step.number}"):
                    self._train_step(rollout_id, step, plan, later if step.number else data, metrics, clock)
                    if critic_plan is not None:
                        own = critic_plan.steps[step.number]
                        critic_step(self._passes, self._models.critic, own, critic_plan, data,
                                    metrics=metrics, clock=clock, where=self._hooks.where)  # fmt: skip
                        if critic_alone:
                            metrics.add("tokens", _tokens(data, own))
        with clock.phase("metrics"):
            numbers = metrics.gather(contribute=init.is_reporting_rank(), device=init.device())
            numbers = self._work.finish(finish_explained_variance(numbers))
            place = init.data_parallel_rank(), init.data_parallel_size()
            ran = critic_plan if critic_alone and critic_plan is not None else plan
            numbers |= self._work.compare_ranks(data, ran.steps, *place, _sum_over_ranks)
            if not critic_alone:
                numbers |= {"samples_skipped": plan.samples_skipped, "skipped_steps": plan.steps_skipped}
            reported = report_metrics(numbers, self.num_steps - ran.steps_skipped)
        return TrainStepReport(metrics=reported, seconds=clock.seconds, token_gaps=metrics.token_gaps.report())

    def _load_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]], Siblings | None]:
        """Return this rank's samples as tensors, for each step their positions among them, and their siblings."""
        columns = validate_columns(batch)
        siblings = number_rollouts(columns)
        columns.setdefault("sample_indices", list(range(len(columns["tokens"]))))
        if self._teacher_here and "teacher_log_probs" in columns:
            raise SampleError(
                "the rollout brings 'teacher_log_probs' and --opd-teacher-load names a teacher that computes them: "
                "leave the flag out to use the rollout's"
            )
        origin = self._origin + self._hooks.where
        if self._has_advantages(columns):
            check_policy_columns(columns, self._objective, rewards=self._hooks.one("advantage") is None, origin=origin)
            columns = self._pieces.baselines(columns)
        elif self._run.loss_type == "custom_loss" and needs_old_log_probs_first(self._objective):
            flag = "--use-opd" if self._objective.use_opd else "--kl-coef"
            raise SampleError(
                f"{flag} is a part of advantages, which --loss-type custom_loss has only of rollouts with the column "
                f"'rewards', and this one has none{origin}: leave {flag} out, or give samples a reward"
            )
        shards = shard_columns(
            columns,
            data_parallel_size=init.data_parallel_size(),
            num_steps=self.num_steps,
            rollouts=siblings.numbers if siblings is not None else None,
            costs=self._work.costs(columns),
            idle=self._pieces.idle(columns),
            balance=self._balance,
        )
        own = shards[init.data_parallel_rank()]
        data, shares = take_share(columns, own, init.device())
        check_columns(data, PER_RESPONSE_TOKEN, origin)
        return data, shares, siblings.of(chain.from_iterable(own)) if siblings is not None else None

    def _has_advantages(self, columns: dict[str, Any]) -> bool:
        """Say whether this rollout gets advantages and old log-probs: a custom loss may train on data without rewards,
        as supervised training does."""
        own_advantages = self._hooks.one("advantage") is not None or self._models.critic is not None
        if self._run.loss_type == "custom_loss" and not own_advantages:
            return "rewards" in columns
        return self._pieces.advantage is not None

    def _model_columns(self, data: dict[str, Any], metrics: Metrics, clock: PhaseClock) -> dict[str, Any]:
        """Return the columns that must be whole before anything else is computed, `log_probs` perhaps among them."""
        wanted = self._has_advantages(data)
        reused = wanted and self._objective.use_rollout_logprobs
        added = {"log_probs": list(data["rollout_log_probs"])} if reused else {}
        old = wanted and not reused and self._recompute and self._recompute_first
        return added | model_columns(self._models, self._passes, data, metrics, clock, old=old)

    def _later_log_probs(self, data: dict[str, Any], plan: Plan, metrics: Metrics, clock: PhaseClock) -> dict[str, Any]:
        """Return the column `log_probs` for the samples of later steps, where it is not there yet.

        The first step runs on the weights of the old log-probs: there the loss detaches its own.
        """
        positions = [i for step in plan.steps[1:] for i in step.positions]
        if self._recompute and not self._recompute_first and positions:
            with clock.phase("log_probs"):
                packed = self._passes.pack(data, positions)
                return self._passes.old_log_probs(self._models.policy.model, packed, metrics)
        others = self._models.reference is not None or self._models.teacher is not None
        if not (others or (self._recompute and self._recompute_first and self._has_advantages(data))):
            self._hooks.skip("before_log_prob")
        return {}

    def _finish_columns(self, rollout_id: int, data: dict[str, Any], metrics: Metrics) -> None:
        """Set advantages, let hooks change the columns, normalise, record.

        Hooks run on the last pipeline stage only; what other stages need of their result, `_plan` tells them.
        """
        hooks, last, advantage = self._hooks, init.is_last_stage(), self._pieces.advantage
        if not (self._has_advantages(data) and (last or not self._pieces.late_columns)):
            advantage = None
        if advantage is not None:
            advantage(data)
            check_columns(data, ("returns", "advantages"), hooks.where)
        if last:
            call_postprocess(hooks, rollout_id, data)
        if last and advantage is not None:
            metrics.add_all(advantage_metrics(data, self._objective))
            if "values" in data:
                metrics.add_all(value_errors(data))
        if advantage is not None and self._pieces.normalise is not None:
            self._pieces.normalise(data)
        if init.is_reporting_rank() and init.data_parallel_rank() == 0:
            self._recorder.write(rollout_id, data)

    def _plans(
        self, rollout_id: int, data: dict[str, Any], shares: list[list[int]], siblings: Siblings | None
    ) -> tuple[Plan, Plan | None]:
        """Choose what runs of the policy's steps, and of the critic's, if there is one; all ranks come to the same."""
        everything = [True] * len(data["tokens"])
        running, critic_alone = everything, rollout_id < self._critic_alone
        if critic_alone:
            running = [False] * len(everything)
        elif self._pieces.skips:
            knows = init.is_last_stage() or not self._pieces.late_columns
            running = samples_that_pull(data) if knows else everything
            running = init.from_last_stage(running) if self._pieces.late_columns else running
        plan = partial(
            plan_steps, data, shares, objective=self._objective, siblings=siblings, sum_over_ranks=_sum_over_ranks
        )
        policy = plan(running=running)
        if self._models.critic is None:
            return policy, None
        # Whether anything may be left out is the same on all ranks, who sum up together; what is left out may not be.
        return policy, plan(running=everything) if critic_alone or self._pieces.skips else policy

    def _train_step(
        self, rollout_id: int, step: Step, plan: Plan, data: dict[str, Any], metrics: Metrics, clock: PhaseClock
    ) -> None:
        """Take one optimizer step, if anything runs in it; metrics average over the rollout's steps that run."""
        hooks = self._hooks
        if not step.positions:
            hooks.skip("before_train_step", "loss", "importance_weights", "pg_loss_reducer")
            return
        model, optimizer = self._models.policy
        hooks.call_each(
            "before_train_step", hooks.args, rollout_id, step.number, model, optimizer.inner, optimizer.scheduler
        )
        with clock.phase("forward_backward"):
            results, seen, micro_batches = self._passes.forward_backward(model, step, data)
        with clock.phase("guards"):
            check_seen(seen, hooks.where, self._pieces.loss_name)
            # Steps that train nothing leave the weights as they were: what matters is the first that trains.
            fresh = not any(earlier.positions for earlier in plan.steps[: step.number])
            if fresh and not step.stand_in and not (self._recompute and "log_probs" in data):
                # These samples' only pass on the weights that generated them.
                for one in seen:
                    compare(metrics, one.output_R, one.batch)
        with clock.phase("optimizer"):
            rate = optimizer.learning_rate
            _, grad_norm = optimizer.step()
        note_zero_gradient(metrics, step.number, norm=grad_norm, rate=rate, seen=seen, results=results)
        weight = 1.0 / (self.num_steps - plan.steps_skipped)
        add_loss_metrics(metrics, results, step, loss_weight=1.0 / self.num_steps, weight=weight)
        share = weight / init.data_parallel_size()
        metrics.add("grad_norm", grad_norm * share)
        metrics.add("lr", rate * share)
        metrics.add("tokens", _tokens(data, step))
        metrics.add("micro_batches", float(micro_batches))
        metrics.add("attention_slots", float(sum(count_slots(one.batch["total_lengths"]) for one in seen)))


def _tokens(data: dict[str, Any], step: Step) -> float:
    return float(sum(data["total_lengths"][i] for i in step.positions))


def _sum_over_ranks(counts: list[list[float]]) -> list[list[float]]:
    if dist.get_world_size() == 1:
        return counts
    packed = torch.tensor(counts, dtype=torch.float64, device=init.device())
    dist.all_reduce(packed if init.is_reporting_rank() else packed.zero_())
    return packed.tolist()
