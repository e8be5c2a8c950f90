"""One trainer rank: from a rollout's columns to updated weights. Plain Python; the driver wraps it in a Ray actor."""

# ruff: noqa: N803, N806  the shape suffixes
# T packed tokens of a micro-batch, V (local) vocabulary, R response tokens

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from miles_api.errors import ConfigError, ServiceError
from miles_api.run_options import RunOptions
from miles_api.services import TrainStepReport
from miles_train.batching import pack_micro_batches
from miles_train.columns import select, shard_columns, to_tensors, validate_columns
from miles_train.guards import check_finite
from miles_train.log_probs import packed_log_probs_and_entropy
from miles_train.megatron import checkpoint, forward, hf, init
from miles_train.megatron.core import DistributedDataParallel, parallel_state
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.metrics import Metrics, PhaseClock
from miles_train.objective import (
    Step,
    check_policy_columns,
    logprob_gap,
    pieces_of,
    plan_steps,
    report_metrics,
    samples_that_pull,
)
from miles_train.options import BatchingOptions, ObjectiveOptions, OptimizerOptions, ParallelOptions
from miles_train.seen import Seen, check_seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_api.config import RunConfig

__all__ = ["Trainer"]


class Trainer:
    """Implements `miles_api.services.TrainService` for one rank of the trainer."""

    def __init__(
        self,
        config: RunConfig,
        *,
        rank: int,
        world_size: int,
        master_addr: str,
        master_port: int,
        local_rank: int = 0,
    ) -> None:
        """Read the options; nothing starts before `start`. The batch sizes in `config` must all be derived."""
        self._run = config.group(RunOptions)
        self._parallel = config.group(ParallelOptions)
        self._optimization = config.group(OptimizerOptions)
        self._objective = config.group(ObjectiveOptions)
        self._batching = config.group(BatchingOptions)
        self._place = {
            "rank": rank,
            "world_size": world_size,
            "master_addr": master_addr,
            "master_port": master_port,
            "local_rank": local_rank,
        }
        if self._run.num_steps_per_rollout is None:
            raise ConfigError("--num-steps-per-rollout was not derived before the trainer was built")
        self._num_steps = self._run.num_steps_per_rollout
        self._pieces = pieces_of(self._run, self._objective)
        self._is_policy = self._pieces.advantage is not None
        self._recompute = self._is_policy and self._num_steps > 1 and not self._objective.use_rollout_logprobs
        self._skip = self._is_policy and self._objective.skip_zero_advantage and self._objective.entropy_coef == 0
        self._model: list[DistributedDataParallel] = []
        self._optimizer: Any = None

    def start(self) -> None:
        """Initialise the process groups, load the model and build the optimizer."""
        hf_checkpoint = self._hf_checkpoint()
        init.initialize(self._parallel, seed=self._run.seed, **self._place)
        self._model = build_model(hf_checkpoint, self._parallel)
        self._optimizer = build_optimizer(
            self._model, self._optimization, self._parallel, total_steps=self._run.num_rollout * self._num_steps
        )
        # The loaded modules stay: the collector need not look at them again in every step.
        gc.collect()
        gc.freeze()

    def train(self, rollout_id: int, batch: dict[str, Any]) -> TrainStepReport:
        """Train on one rollout; `batch` holds the whole rollout's columns, of which this rank takes its share.

        Called on every rank with the same columns; the report's metrics are the same on each. `train/loss` is averaged
        over all samples of a step, the loss's other metrics over the samples that ran; counts are totals.

        Raises:
            SampleError: the columns contradict each other, or lack one that the loss needs.
            MilesError: NaN or infinity in rewards, log-probs, advantages, loss or gradients.
        """
        self._require_start()
        clock, metrics, where = PhaseClock(), Metrics(), f" in rollout {rollout_id}"
        with clock.phase("data"):
            data, shares = self._load_batch(batch)
        if self._recompute and self._pieces.advantage_reads_log_probs:
            with clock.phase("log_probs"):
                data |= self._old_log_probs(data, range(len(data["tokens"])), metrics, where)
        elif self._is_policy and self._objective.use_rollout_logprobs:
            data["log_probs"] = data["rollout_log_probs"]
        with clock.phase("advantages"):
            self._add_advantages(data, where)
            running = samples_that_pull(data) if self._skip else [True] * len(data["tokens"])
            per_token = self._objective.calculate_per_token_loss
            plan = plan_steps(data, shares, running, per_token=per_token, sum_over_ranks=self._sum_over_ranks)
        # The first step runs on the weights of the old log-probs: there the loss detaches its own.
        later = data
        if self._recompute and "log_probs" not in data:
            with clock.phase("log_probs"):
                positions = [i for step in plan.steps[1:] for i in step.positions]
                later = data | self._old_log_probs(data, positions, metrics, where)
        trained = self._num_steps - plan.steps_skipped
        for step in [step for step in plan.steps if step.positions]:
            # Steps that train nothing leave the weights as they were: what matters is the first that trains.
            fresh = not any(earlier.positions for earlier in plan.steps[: step.number])
            self._train_step(step, later if step.number else data, metrics, clock, 1.0 / trained, where, fresh)
        with clock.phase("metrics"):
            numbers = metrics.gather(contribute=self._contributes(), device=init.device())
            numbers |= {"samples_skipped": plan.samples_skipped, "skipped_steps": plan.steps_skipped}
        return TrainStepReport(metrics=report_metrics(numbers, trained), seconds=clock.seconds)

    def export(self, directory: str, weights_only: bool = False) -> None:
        """Write the current weights as a Hugging Face directory, with the tokenizer unless `weights_only`.

        Every rank calls it.
        """
        self._require_start()
        hf.export_hf(self._model, self._hf_checkpoint(), directory, extra_files=not weights_only)

    def save(self, rollout_id: int, directory: str) -> None:  # noqa: ARG002  the directory already belongs to it
        """Write weights, optimizer and schedule into `directory`, new or empty; every rank calls it."""
        self._require_start()
        checkpoint.save(self._model, self._optimizer, directory)

    def load(self, rollout_id: int, directory: str) -> None:  # noqa: ARG002
        """Continue from what `save` wrote to `directory`; every rank calls it, after `start`."""
        self._require_start()
        checkpoint.load(self._model, self._optimizer, directory)

    def stop(self) -> None:
        """Leave the process groups and drop the model; safe to call twice."""
        self._model, self._optimizer = [], None
        init.shutdown()

    def _load_batch(self, batch: dict[str, Any]) -> tuple[dict[str, Any], list[list[int]]]:
        """Return this rank's samples as tensors, and for each step their positions among them."""
        columns = validate_columns(batch)
        columns.setdefault("sample_indices", list(range(len(columns["tokens"]))))
        if self._is_policy:
            check_policy_columns(columns, use_rollout_logprobs=self._objective.use_rollout_logprobs)
        shards = shard_columns(columns, data_parallel_size=init.data_parallel_size(), num_steps=self._num_steps)
        mine = shards[init.data_parallel_rank()]
        data = to_tensors(select(columns, [i for step in mine for i in step]), init.device())
        if "rollout_log_probs" in data:
            values_R = torch.cat(data["rollout_log_probs"])
            check_finite("rollout_log_probs", values_R, data["response_lengths"], data["sample_indices"])
        starts = [sum(map(len, mine[:step])) for step in range(len(mine))]
        return data, [list(range(start, start + len(step))) for start, step in zip(starts, mine, strict=True)]

    def _old_log_probs(
        self, data: dict[str, Any], positions: Sequence[int], metrics: Metrics, where: str
    ) -> dict[str, list[Tensor | None]]:
        """Return the column `log_probs` under the current weights, None for samples that are not in `positions`.

        The result is empty on pipeline stages before the last, which see no logits.
        """
        packs, batches = self._micro_batches(data, positions)

        def observe(logits_TV: Tensor, batch: dict[str, Any]) -> tuple[None, dict[str, Any]]:
            return None, {"log_probs_R": self._log_probs(logits_TV, batch)[0]}

        results = forward.run(self._model, batches, observe, forward_only=True)
        column: list[Tensor | None] = [None] * len(data["tokens"])
        for pack, batch, result in zip(packs, batches, results, strict=bool(results)):
            log_probs_R = result["log_probs_R"]
            check_finite("log_probs", log_probs_R, batch["response_lengths"], batch["sample_indices"], where)
            metrics.add_all(logprob_gap(log_probs_R, batch))
            for position, log_probs in zip(pack, log_probs_R.split(batch["response_lengths"]), strict=True):
                column[position] = log_probs
        return {"log_probs": column} if results else {}

    def _add_advantages(self, data: dict[str, Any], where: str) -> None:
        """Set `advantages` and `returns`, for losses that have them."""
        if self._pieces.advantage is None:
            return
        self._pieces.advantage(data)
        values_R = torch.cat(data["advantages"])
        check_finite("advantages", values_R, data["response_lengths"], data["sample_indices"], where)

    def _train_step(
        self,
        step: Step,
        data: dict[str, Any],
        metrics: Metrics,
        clock: PhaseClock,
        weight: float,
        where: str,
        fresh: bool,
    ) -> None:
        """Take one optimizer step; its metrics count with `weight`, so that they average over the rollout's steps.

        `fresh` says that the weights are still those that generated the samples.
        """
        where = f"{where}, step {step.number}"
        seen: list[Seen] = []
        with clock.phase("forward_backward"):
            _, batches = self._micro_batches(data, step.positions)
            results = forward.run(self._model, batches, self._loss_step(step, seen), forward_only=False)
        with clock.phase("guards"):
            check_seen(seen, where)
            if fresh and not (self._recompute and "log_probs" in data):
                # These samples' only pass on the weights that generated them.
                for one in seen:
                    metrics.add_all(logprob_gap(one.log_probs_R, one.batch))
        with clock.phase("optimizer"):
            rate = self._optimizer.learning_rate
            _, grad_norm = self._optimizer.step()
        for name, value in (item for result in results for item in result.items()):
            # A skipped step has a loss of exactly 0; of other metrics it has none.
            scale = (
                1 / (step.loss_denominator * self._num_steps) if name == "loss" else weight / step.metric_denominator
            )
            metrics.add(name, value if name.endswith("_max") else value * scale)
        share = weight / init.data_parallel_size()
        metrics.add("grad_norm", grad_norm * share)
        metrics.add("lr", rate * share)
        metrics.add("tokens", float(sum(data["total_lengths"][i] for i in step.positions)))
        metrics.add("micro_batches", float(len(batches)))

    def _loss_step(self, step: Step, seen: list[Seen]) -> forward.LossStep:
        """Return what Megatron calls with the logits of each micro-batch."""

        def loss_step(logits_TV: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            lengths = batch["response_lengths"]
            passes: list[Tensor] = []

            def log_probs_and_entropy(logits: Tensor, entropy: bool = False) -> tuple[list[Tensor], Any]:
                log_probs_R, entropy_R = self._log_probs(logits, batch, entropy=entropy)
                passes.append(log_probs_R.detach())
                return list(log_probs_R.split(lengths)), None if entropy_R is None else list(entropy_R.split(lengths))

            per_token = self._objective.calculate_per_token_loss
            reduce = self._pieces.reducer(batch["total_lengths"], lengths, batch["loss_masks"], per_token)
            loss, result = self._pieces.loss(
                self._objective, batch, logits_TV, reduce, log_probs_and_entropy=log_probs_and_entropy
            )
            loss = loss / step.loss_denominator
            seen.append(Seen(batch, passes[0] if passes else logits_TV.new_zeros(0), loss.detach()))
            return loss, result

        return loss_step

    def _micro_batches(
        self, data: dict[str, Any], positions: Sequence[int]
    ) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """Pack samples; return each micro-batch's positions in the rollout data, and its columns."""
        lengths = [data["total_lengths"][i] for i in positions]
        packs = pack_micro_batches(lengths, self._batching.max_tokens_per_gpu)
        packs = [[positions[i] for i in pack] for pack in packs]
        return packs, [select(data, pack) for pack in packs]

    def _log_probs(
        self, logits_TV: Tensor, batch: dict[str, Any], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return packed_log_probs_and_entropy(
            logits_TV,
            batch["tokens"],
            batch["response_lengths"],
            self._run.rollout_temperature,
            entropy=entropy,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def _contributes(self) -> bool:
        """Say whether this rank's numbers count: one rank of each data-parallel replica, where the loss is."""
        return init.is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0

    def _sum_over_ranks(self, counts: list[list[float]]) -> list[list[float]]:
        if dist.get_world_size() == 1:
            return counts
        packed = torch.tensor(counts, dtype=torch.float64, device=init.device())
        dist.all_reduce(packed if self._contributes() else packed.zero_())
        return packed.tolist()

    def _hf_checkpoint(self) -> str:
        if self._run.hf_checkpoint is None:
            raise ConfigError("--hf-checkpoint is needed to train: it holds the model's config and first weights")
        return self._run.hf_checkpoint

    def _require_start(self) -> None:
        if not self._model:
            raise ServiceError("the trainer is not started")
