"""The forward passes of one trainer rank: old log-probs, and loss with gradient, over packed micro-batches."""

# ruff: noqa: N803, N806  the shape suffixes
# T packed tokens of a micro-batch, V (local) vocabulary, R response tokens

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.run_options import RunOptions
from miles_train.batching import pack_micro_batches
from miles_train.columns import select
from miles_train.guards import check_finite
from miles_train.log_probs import packed_log_probs_and_entropy
from miles_train.megatron import forward
from miles_train.megatron.core import parallel_state
from miles_train.objective import logprob_gap
from miles_train.options import BatchingOptions, ObjectiveOptions
from miles_train.reducers import sum_of_sample_mean
from miles_train.seen import Seen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from miles_api.config import RunConfig
    from miles_train.megatron.core import DistributedDataParallel
    from miles_train.metrics import Metrics
    from miles_train.objective import Pieces, Step
    from miles_train.train_hooks import HookCalls

__all__ = ["Passes"]


class Passes:
    """Runs a model over a rank's samples."""

    def __init__(self, config: RunConfig, pieces: Pieces, hooks: HookCalls) -> None:
        self._temperature = config.group(RunOptions).rollout_temperature
        self._per_token = config.group(ObjectiveOptions).calculate_per_token_loss
        self._max_tokens = config.group(BatchingOptions).max_tokens_per_gpu
        self._pieces = pieces
        self._hooks = hooks

    def old_log_probs(
        self, model: list[DistributedDataParallel], data: dict[str, Any], positions: Sequence[int], metrics: Metrics
    ) -> dict[str, list[Tensor | None]]:
        """Return the column `log_probs` under the current weights, None for samples that are not in `positions`.

        The result is empty on pipeline stages before the last, which see no logits. The `before_log_prob` hook is
        called first.
        """
        self._hooks.call_each("before_log_prob", self._hooks.args, model, "")
        packs, batches = self._micro_batches(data, positions)

        def observe(logits_TV: Tensor, batch: dict[str, Any]) -> tuple[None, dict[str, Any]]:
            return None, {"log_probs_R": self._log_probs(logits_TV, batch)[0]}

        results = forward.run(model, batches, observe, forward_only=True)
        column: list[Tensor | None] = [None] * len(data["tokens"])
        for pack, batch, result in zip(packs, batches, results, strict=bool(results)):
            log_probs_R = result["log_probs_R"]
            where = self._hooks.where
            check_finite("log_probs", log_probs_R, batch["response_lengths"], batch["sample_indices"], where)
            metrics.add_all(logprob_gap(log_probs_R, batch))
            for position, log_probs in zip(pack, log_probs_R.split(batch["response_lengths"]), strict=True):
                column[position] = log_probs
        return {"log_probs": column} if results else {}

    def forward_backward(
        self, model: list[DistributedDataParallel], step: Step, data: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Seen], int]:
        """Compute loss and gradient of one optimizer step.

        Returns each micro-batch's metrics and what its pass showed, both empty before the last pipeline stage, and
        the number of micro-batches.
        """
        seen: list[Seen] = []
        _, batches = self._micro_batches(data, step.positions)

        def loss_step(logits_TV: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            lengths = batch["response_lengths"]
            passes: list[Tensor] = []

            def log_probs_and_entropy(logits: Tensor, entropy: bool = False) -> tuple[list[Tensor], Any]:
                log_probs_R, entropy_R = self._log_probs(logits, batch, entropy=entropy)
                passes.append(log_probs_R.detach())
                return list(log_probs_R.split(lengths)), None if entropy_R is None else list(entropy_R.split(lengths))

            reduce = sum_of_sample_mean(batch["total_lengths"], lengths, batch["loss_masks"], self._per_token)
            loss, result = self._pieces.loss(batch, logits_TV, reduce, log_probs_and_entropy=log_probs_and_entropy)
            loss = loss / step.loss_denominator
            seen.append(Seen(batch, passes[0] if passes else logits_TV.new_zeros(0), loss.detach()))
            return loss, result

        return forward.run(model, batches, loss_step, forward_only=False), seen, len(batches)

    def _micro_batches(
        self, data: dict[str, Any], positions: Sequence[int]
    ) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """Pack samples; return each micro-batch's positions in the rollout data, and its columns."""
        lengths = [data["total_lengths"][i] for i in positions]
        packs = pack_micro_batches(lengths, self._max_tokens)
        packs = [[positions[i] for i in pack] for pack in packs]
        return packs, [select(data, pack) for pack in packs]

    def _log_probs(
        self, logits_TV: Tensor, batch: dict[str, Any], *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return packed_log_probs_and_entropy(
            logits_TV,
            batch["tokens"],
            batch["response_lengths"],
            self._temperature,
            entropy=entropy,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )
