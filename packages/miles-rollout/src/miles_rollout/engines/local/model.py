"""What the scheduler needs of a model, and the choice between the two that offer it."""

# ruff: noqa: N803 - tensor names end in their shape
from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol

from miles_rollout.engines.local.errors import UnsupportedModelError
from miles_rollout.engines.local.lean import LeanModel
from miles_rollout.engines.local.lean_fixed import FixedShapeModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

    from miles_rollout.engines.local.kv import KVLayout, KVPool, Prefill
    from miles_rollout.engines.local.weights import Weights

__all__ = ["SlotModel", "load_model"]


class SlotModel(Protocol):
    """A causal language model that keeps its keys and values in the rows of a `KVPool`. Float32 throughout."""

    impl: str
    deterministic: bool
    """Whether what a row gets depends, bit for bit, on that row alone."""
    vocab_size: int
    max_positions: int
    layout: KVLayout

    def prefill(self, tokens_BL: torch.Tensor, lengths: torch.Tensor) -> Prefill:
        """Run right-padded prompts (int64) from nothing; `lengths` int64 `[B]`."""
        ...

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, pool: KVPool, length: int) -> torch.Tensor:
        """Run one token for each of the pool's first `len(tokens)` rows; return logits `[B, vocabulary]`.

        Writes keys and values at `positions` (int64 `[B]`, all < `length`) and attends to positions up to them.
        """
        ...

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Return the log-probs (float32) of `tokens[start + 1:]`, each given all before it."""
        ...

    def stage(self, weights: Weights) -> Callable[[], None]:
        """Read and check other weights; the function returned puts them in place and cannot fail.

        Raises:
            CheckpointError: names or shapes differ, or a file is damaged; the live weights are untouched.
        """
        ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live weights by a stable name, for checksums."""
        ...

    def computed(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Return what `tensors` would be with these weights, read and computed anew. Raises as `stage` does."""
        ...


def load_model(directory: Path, impl: str, max_total_len: int | None, *, deterministic: bool = False) -> SlotModel:
    """Load the model of a Hugging Face directory; `impl` is `auto`, `lean` or `hf`.

    Raises:
        CheckpointError: a file is missing or damaged.
        UnsupportedModelError: no implementation asked for covers this configuration, or determinism.
    """
    if deterministic:
        return _deterministic(directory, impl, max_total_len)
    if impl in ("auto", "lean"):
        try:
            return LeanModel(directory, max_total_len)
        except UnsupportedModelError as error:
            if impl == "lean":
                raise
            print(f"engine: falling back to transformers: {error}", file=sys.stderr, flush=True)
    # transformers takes seconds to import, and most models never need it here.
    from miles_rollout.engines.local.hf import HFModel  # noqa: PLC0415

    return HFModel(directory, max_total_len)


def _deterministic(directory: Path, impl: str, max_total_len: int | None) -> SlotModel:
    """Load a model whose rows are independent to the bit: transformers' own forward cannot promise that."""
    if impl == "hf":
        raise UnsupportedModelError("--deterministic needs our own forward: --engine-impl lean or auto, not hf")
    try:
        return FixedShapeModel(directory, max_total_len)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"--deterministic needs our own forward, and {error}") from None
