"""What the samples of a rollout cost, and how much of what is computed for them is wasted.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.run_options import RunOptions
from miles_train.megatron.hf_config import read_hf_config
from miles_train.options import BatchingOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from miles_api.config import RunConfig
    from miles_train.megatron.hf_config import HFConfig
    from miles_train.objective import Step

__all__ = ["WORK_METRICS", "WorkMeter", "imbalance", "sample_flops"]

WORK_METRICS = frozenset({"padding_share", "micro_batch_fill", "dp_imbalance", "attention_slots"})
"""Names of metrics that are used here."""


class WorkMeter:
    """Weighs samples as --balance-by-flops says, and the work of steps by their weights."""

    def __init__(self, config: RunConfig) -> None:
        """Read the options, and with --balance-by-flops the sizes in the config of --hf-checkpoint."""
        options, hf_checkpoint = config.group(BatchingOptions), config.group(RunOptions).hf_checkpoint
        self._model = read_hf_config(hf_checkpoint) if options.balance_by_flops and hf_checkpoint else None
        self._max_tokens = options.max_tokens_per_gpu if options.use_dynamic_batch_size else None

    def costs(self, columns: dict[str, Any]) -> list[int]:
        """Return what each sample costs: its tokens, or its floating-point operations."""
        lengths = [len(tokens) for tokens in columns["tokens"]]
        return sample_flops(lengths, columns["response_lengths"], self._model) if self._model else lengths

    def compare_ranks(
        self,
        data: dict[str, Any],
        steps: Sequence[Step],
        rank: int,
        ranks: int,
        sum_over_ranks: Callable[[list[list[float]]], list[list[float]]],
    ) -> dict[str, float]:
        """Return `dp_imbalance` of what runs in the steps, as `imbalance` does; nothing with one data-parallel rank.

        `data` and `steps` are this rank's, `sum_over_ranks` adds up a matrix over the data-parallel ranks.
        """
        if ranks == 1 or not any(step.positions for step in steps):
            return {}
        costs = self.costs(data)
        own = [float(sum(costs[i] for i in step.positions)) for step in steps]
        places = [[0.0] * rank + [work] + [0.0] * (ranks - rank - 1) for work in own]
        return {"dp_imbalance": imbalance(sum_over_ranks(places))}

    def finish(self, numbers: dict[str, float]) -> dict[str, float]:
        """Return the metrics with `attention_slots`, over all ranks and steps, replaced by what it tells.

        `padding_share` is the part of the computed slots that hold no token: of those of attention, nothing else is
        padded. `micro_batch_fill` is the part of --max-tokens-per-gpu that a micro-batch fills, in the mean, above 1
        where a sample is longer; without dynamic micro-batches there is none.
        """
        named = dict(numbers)
        slots = named.pop("attention_slots", 0.0)
        if slots:
            named["padding_share"] = 1.0 - named["tokens"] / slots
            if self._max_tokens is not None:
                named["micro_batch_fill"] = named["tokens"] / (named["micro_batches"] * self._max_tokens)
        return named


def sample_flops(lengths: Sequence[int], response_lengths: Sequence[int], model: HFConfig) -> list[int]:
    """Return each sample's floating-point operations in the matrix products of one forward pass.

    Every token passes through the layers' weights, those of the response through the output layer too, and each looks
    at the tokens before it, which is quadratic in the length. A backward pass takes twice as many, at any length.
    """
    query, keys = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    layer = model.hidden_size * (2 * query + 2 * keys + 3 * model.ffn_hidden_size)
    per_token, per_response = 2 * model.num_layers * layer, 2 * model.vocab_size * model.hidden_size
    # Scores and weighted values, half of each under the causal mask.
    per_pair = 2 * model.num_layers * query
    return [
        per_token * length + per_response * response + per_pair * length * length
        for length, response in zip(lengths, response_lengths, strict=True)
    ]


def imbalance(work: Sequence[Sequence[float]]) -> float:
    """Return by how much the busiest rank's work exceeds the ranks' mean, as a part of that mean, averaged over the
    steps that have any; `work[step][rank]`."""
    excess = [max(ranks) * len(ranks) / sum(ranks) - 1.0 for ranks in work if any(ranks)]
    return sum(excess) / len(excess)
