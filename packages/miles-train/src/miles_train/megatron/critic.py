"""The critic: the GPT model with one number a token in the place of logits (PPO, arXiv 1707.06347)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from .core import DistributedDataParallel, gather_from_sequence_parallel_region
from .model import load_gpt, trainable

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_train.options import ParallelOptions

    from .core import TransformerConfig

__all__ = ["ValueHead", "build_critic"]


def build_critic(
    hf_dir: str,
    parallel: ParallelOptions,
    *,
    param_dtype: torch.dtype = torch.float32,
    provider: Callable[..., Any] | None = None,
) -> list[DistributedDataParallel]:
    """Build this rank's part of a critic from the language model in `hf_dir`: its body, and a new head of zeros.

    Called as `build_model` is, with the same `provider` and errors. `forward.run` hands its values out where a language
    model has logits: (T, 1), on the last pipeline stage, whole on each tensor-parallel rank.
    """
    gpt = load_gpt(hf_dir, parallel, param_dtype=param_dtype, provider=provider)
    # Without an output layer there is nothing that a tied embedding could be tied to, on no stage.
    gpt.share_embeddings_and_output_weights = False
    if gpt.post_process:
        head: Any = ValueHead(gpt.config)
        gpt.output_layer = head
    return trainable(gpt, parallel)


class ValueHead(torch.nn.Module):
    """Maps hidden states to values; called as the output layer is that it replaces."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())
        self.weight = torch.nn.Parameter(torch.zeros(1, config.hidden_size, dtype=config.params_dtype, device=device))
        self._splits_tokens = config.sequence_parallel
        # Megatron sums the gradients of such a weight over the tensor-parallel ranks, which see a part of the tokens
        # each; otherwise all of them see all tokens and have the same gradient.
        self.weight.sequence_parallel = config.sequence_parallel  # pyrefly: ignore[missing-attribute]

    def forward(self, hidden: Tensor, weight: None = None, **_unused: Any) -> tuple[Tensor, None]:  # noqa: ARG002
        """Return values (tokens, 1, 1) of hidden states (tokens of this rank, 1, hidden), and no bias."""
        values = functional.linear(hidden, self.weight)
        if self._splits_tokens:
            # Every rank goes on with the same values, so each takes back its own part of the gradient.
            values = gather_from_sequence_parallel_region(values, tensor_parallel_output_grad=False)
        return values, None
