"""Log-probs of given tokens under the trainer's current weights, to be compared with what engines say."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from miles_train.log_probs import log_probs_and_entropy
from miles_train.megatron import forward, init
from miles_train.megatron.core import parallel_state

if TYPE_CHECKING:
    from torch import Tensor

    from miles_train.megatron.core import DistributedDataParallel

__all__ = ["score"]


def score(model: list[DistributedDataParallel], tokens: list[list[int]]) -> list[list[float]]:
    """Return for each sequence the log-probs of its tokens after the first, at temperature 1.

    A collective of the model's ranks; every data-parallel replica computes the same. Pipeline stages before the last
    return an empty list. All sequences go into one micro-batch.
    """
    sequences = [torch.tensor(sequence, dtype=torch.int64, device=init.device()) for sequence in tokens]
    lengths = [len(sequence) - 1 for sequence in tokens]
    micro_batch = {"tokens": sequences, "response_lengths": lengths}

    def observe(logits: Tensor, batch: dict[str, Any]) -> tuple[None, dict[str, Any]]:
        group = parallel_state.get_tensor_model_parallel_group()
        log_probs, _ = log_probs_and_entropy(logits, batch["tokens"], lengths, 1.0, tp_group=group, rows="response")
        return None, {"log_probs": [values.tolist() for values in log_probs]}

    results = forward.run(model, [micro_batch], observe, forward_only=True, rows="response")
    return results[0]["log_probs"] if results else []
