"""The passes of one trainer rank over packed micro-batches: columns of token values, and losses with gradient."""

# ruff: noqa: N803, N806  the shape suffixes
# R response tokens of a micro-batch, N all its tokens or R, V (local) vocabulary, 1 value

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from miles_api.run_options import RunOptions
from miles_train.batching import make_micro_batches
from miles_train.columns import select
from miles_train.guards import check_finite
from miles_train.log_probs import packed_log_probs_and_entropy
from miles_train.loss import value_loss
from miles_train.megatron import forward
from miles_train.megatron.core import parallel_state
from miles_train.mismatch import compare
from miles_train.options import BatchingOptions, ObjectiveOptions
from miles_train.reducers import reducer_of
from miles_train.seen import Seen, watch_gradient

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from miles_api.config import RunConfig
    from miles_train.log_probs import Rows
    from miles_train.megatron.core import DistributedDataParallel
    from miles_train.metrics import Metrics
    from miles_train.objective import Pieces, Step
    from miles_train.train_hooks import HookCalls

__all__ = ["Column", "Packed", "Passes"]

Column = list[Any]
"""One 1-D fp32 tensor a sample, of its response's length, or None for a sample that was left out."""


class Packed(NamedTuple):
    """Samples of the rollout data in micro-batches."""

    samples: int
    """How many there are in the rollout data."""
    packs: list[list[int]]
    """Positions in the rollout data, by micro-batch."""
    batches: list[dict[str, Any]]
    """The columns of each micro-batch, as they were when it was packed."""


class Passes:
    """Runs a model over a rank's samples."""

    def __init__(self, config: RunConfig, pieces: Pieces, hooks: HookCalls) -> None:
        self._temperature = config.group(RunOptions).rollout_temperature
        self._objective = config.group(ObjectiveOptions)
        self._batching = config.group(BatchingOptions)
        self._chunk_size = self._batching.log_probs_chunk_size
        # A loss hook is promised the logits of every token; nobody else reads those of prompts.
        self._loss_rows: Rows = "all" if config.group(RunOptions).loss_type == "custom_loss" else "response"
        self._pieces = pieces
        self._hooks = hooks

    def pack(self, data: dict[str, Any], positions: Sequence[int]) -> Packed:
        """Return samples of the rollout data as micro-batches, which several models may pass over."""
        return Packed(len(data["tokens"]), *self._micro_batches(data, positions))

    def old_log_probs(self, model: list[Any], packed: Packed, metrics: Metrics) -> dict[str, Column]:
        """Return the column `log_probs` under the policy's current weights, as `log_probs` does, and add to `metrics`
        how they compare with the engine's."""
        found = self.log_probs(model, packed, "")
        for column in found.values():
            for pack, batch in zip(packed.packs, packed.batches, strict=True):
                compare(metrics, torch.cat([column[i] for i in pack]), batch)
        return found

    def log_probs(self, model: list[Any], packed: Packed, prefix: str) -> dict[str, Column]:
        """Return the column `<prefix>log_probs` of a model, as `_token_column` does.

        The `before_log_prob` hook is called first, with the prefix: empty for the policy, `ref_` or `teacher_`.
        """
        self._hooks.call_each("before_log_prob", self._hooks.args, model, prefix)

        def read(logits_RV: Tensor, batch: dict[str, Any]) -> Tensor:
            return self._log_probs(logits_RV, batch, "response")[0]

        return self._token_column(f"{prefix}log_probs", model, packed, read)

    def values(self, critic: list[Any], packed: Packed) -> dict[str, Column]:
        """Return the column `values` of a critic, as `_token_column` does."""
        return self._token_column("values", critic, packed, _values)

    def _token_column(
        self, name: str, model: list[Any], packed: Packed, read: Callable[[Tensor, dict[str, Any]], Tensor]
    ) -> dict[str, Column]:
        """Run a model without gradient; return a column of one number a response token, which `read` makes (R,) of the
        model's output for a micro-batch. Samples that are not in `packed` have None.

        The result is empty on pipeline stages before the last, which see no output. Raises MilesError, naming column
        and sample, for NaN or infinity.
        """
        results = forward.run(
            model,
            packed.batches,
            lambda out, batch: (None, {name: read(out, batch)}),
            forward_only=True,
            rows="response",
        )
        column: Column = [None] * packed.samples
        for pack, batch, result in zip(packed.packs, packed.batches, results, strict=bool(results)):
            lengths = batch["response_lengths"]
            check_finite(name, result[name], lengths, batch["sample_indices"], self._hooks.where)
            for position, values in zip(pack, result[name].split(lengths), strict=True):
                column[position] = values
        return {name: column} if results else {}

    def forward_backward(
        self, model: list[DistributedDataParallel], step: Step, data: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Seen], int]:
        """Compute loss and gradient of one optimizer step.

        Returns each micro-batch's metrics and what its pass showed, both empty before the last pipeline stage, and
        the number of micro-batches.
        """
        seen: list[Seen] = []
        _, batches = self._micro_batches(data, step.positions)

        def loss_step(logits_NV: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            lengths = batch["response_lengths"]
            passes: list[Tensor] = []
            pulls: list[Tensor] = []

            def log_probs_and_entropy(logits: Tensor, entropy: bool = False) -> tuple[list[Tensor], Any]:
                log_probs_R, entropy_R = self._log_probs(logits, batch, self._loss_rows, entropy=entropy)
                passes.append(log_probs_R.detach())
                watch_gradient(log_probs_R, pulls)
                return list(log_probs_R.split(lengths)), None if entropy_R is None else list(entropy_R.split(lengths))

            reduce = reducer_of(batch, self._objective)
            loss, result = self._pieces.loss(batch, logits_NV, reduce, log_probs_and_entropy=log_probs_and_entropy)
            loss = loss / step.loss_denominator
            seen.append(Seen(batch, passes[0] if passes else logits_NV.new_zeros(0), loss.detach(), pulls))
            return loss, result

        results = forward.run(model, batches, loss_step, forward_only=False, rows=self._loss_rows)
        return results, seen, len(batches)

    def critic_backward(
        self, critic: list[DistributedDataParallel], step: Step, data: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], list[Seen]]:
        """Compute the value loss and its gradient of one optimizer step; returns what `forward_backward` does."""
        seen: list[Seen] = []
        _, batches = self._micro_batches(data, step.positions)

        def loss_step(values_R1: Tensor, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
            reduce = reducer_of(batch, self._objective)
            values_R = _values(values_R1, batch)
            pulls: list[Tensor] = []
            watch_gradient(values_R, pulls)
            loss, result = value_loss(self._objective, batch, values_R, reduce)
            loss = loss / step.loss_denominator
            seen.append(Seen(batch, values_R.detach(), loss.detach(), pulls))
            return loss, result

        return forward.run(critic, batches, loss_step, forward_only=False, rows="response"), seen

    def _micro_batches(
        self, data: dict[str, Any], positions: Sequence[int]
    ) -> tuple[list[list[int]], list[dict[str, Any]]]:
        """Pack samples; return each micro-batch's positions in the rollout data, and its columns."""
        lengths = [data["total_lengths"][i] for i in positions]
        packs = make_micro_batches(lengths, self._batching)
        packs = [[positions[i] for i in pack] for pack in packs]
        return packs, [select(data, pack) for pack in packs]

    def _log_probs(
        self, logits_NV: Tensor, batch: dict[str, Any], rows: Rows, *, entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return packed_log_probs_and_entropy(
            logits_NV,
            batch["tokens"],
            batch["response_lengths"],
            self._temperature,
            entropy=entropy,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            chunk_size=self._chunk_size,
            rows=rows,
        )


def _values(values_R1: Tensor, _batch: dict[str, Any]) -> Tensor:
    """Return the values of all response tokens, (R,) in fp32: a token's is where the token is predicted."""
    return values_R1.squeeze(-1).float()
