"""Memory that a trainer rank lends to others: models and optimizer states move to host memory and back.

Storages move, not tensors: all views of one, such as parameters and gradients in Megatron's buffers or the optimizer's
shards of them, stay where they are in the program, and find their values again.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .core import DistributedDataParallel
from .cpu import has_gpu

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from .optimizer import Optimizer

__all__ = ["Lender"]


class _Away(NamedTuple):
    """A storage that has been emptied."""

    storage: torch.UntypedStorage
    size: int
    copy: Tensor | None
    """What it held, as bytes in host memory; None for gradients, which begin at zero in every step."""


class Lender:
    """What one rank holds of its models and optimizers, there or away."""

    def __init__(
        self,
        policy: list[DistributedDataParallel],
        others: Iterable[Sequence[torch.nn.Module]],
        optimizers: list[Optimizer],
    ) -> None:
        """`others` are the models beside the policy, trained or not; `optimizers` those of all models."""
        self._policy = policy
        self._models = [*policy, *(chunk for model in others for chunk in model)]
        self._optimizers = optimizers
        self._weights_away: list[_Away] = []
        self._rest_away: list[_Away] = []

    @property
    def weights_here(self) -> bool:
        """Whether the weights of the policy can be read."""
        return not self._weights_away

    @property
    def all_here(self) -> bool:
        """Whether everything can be used."""
        return not (self._weights_away or self._rest_away)

    def lend(self, *, keep_weights: bool = False) -> dict[str, float]:
        """Move everything to host memory, but for the policy's weights with `keep_weights`; return bytes and seconds.

        Called between two steps: gradients are dropped. What is away already stays so.
        """
        started = time.perf_counter()
        weights = {_key(tensor) for chunk in self._policy for tensor in _weights_of(chunk)}
        gradients = {_key(tensor) for model in self._models for tensor in _gradients_of(model)}
        moved = 0
        for key, storage in self._storages().items():
            if key in weights and keep_weights:
                continue
            away = _Away(storage, storage.nbytes(), None if key in gradients else _on_host(storage))
            storage.resize_(0)
            (self._weights_away if key in weights else self._rest_away).append(away)
            moved += away.size
        if has_gpu():
            # What the allocator keeps for itself is of no use to an engine.
            torch.cuda.empty_cache()
        return {"bytes": float(moved), "seconds": time.perf_counter() - started}

    def take_back(self) -> dict[str, float]:
        """Bring everything back where it was, bit for bit; return bytes and seconds."""
        started = time.perf_counter()
        moved = _brought_back(self._weights_away) + _brought_back(self._rest_away)
        return {"bytes": float(moved), "seconds": time.perf_counter() - started}

    @contextmanager
    def with_weights(self) -> Iterator[None]:
        """Have the policy's weights here meanwhile, if they are away: as much memory as a push needs."""
        away = bool(_brought_back(self._weights_away))
        yield
        if away:
            self.lend()

    def _storages(self) -> dict[int, torch.UntypedStorage]:
        """Return every storage that is here, once, by its address."""
        tensors: list[Tensor] = []
        for model in self._models:
            tensors += [*_weights_of(model), *_gradients_of(model)]
        for optimizer in self._optimizers:
            tensors += _state_of(optimizer)
        storages = {_key(tensor): tensor.untyped_storage() for tensor in tensors}
        # On a CPU memory that numpy has seen stays where it is; a hook may have shown it.
        return {key: storage for key, storage in storages.items() if storage.nbytes() and storage.resizable()}


def _brought_back(away: list[_Away]) -> int:
    """Fill emptied storages again; return how many bytes they have."""
    moved = 0
    while away:
        storage, size, copy = away.pop()
        storage.resize_(size)
        here = _as_bytes(storage)
        here.zero_() if copy is None else here.copy_(copy)
        moved += size
    if has_gpu():
        torch.cuda.synchronize()
    return moved


def _weights_of(model: torch.nn.Module) -> Iterator[Tensor]:
    # `buffers` of Megatron's wrapper are other ones.
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    yield from plain.parameters()
    yield from plain.buffers()
    if isinstance(model, DistributedDataParallel):
        yield from (part.param_data for part in _buffers_of(model) if part.param_data is not None)


def _gradients_of(model: torch.nn.Module) -> Iterator[Tensor]:
    if isinstance(model, DistributedDataParallel):
        yield from (part.grad_data for part in _buffers_of(model))


def _buffers_of(model: DistributedDataParallel) -> list[Any]:
    """Return Megatron's contiguous buffers of parameters and gradients."""
    return [*model.buffers, *model.expert_parallel_buffers]


def _state_of(optimizer: Optimizer) -> Iterator[Tensor]:
    """Yield moments and fp32 masters, whole or sharded; counters of steps stay, wherever they are."""
    for one in optimizer.inner.chained_optimizers:
        inner = one.optimizer
        if inner is None:  # a rank without parameters of this kind
            continue
        yield from (parameter for group in inner.param_groups for parameter in group["params"])
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, torch.Tensor) and value.dim())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _as_bytes(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _on_host(storage: torch.UntypedStorage) -> Tensor:
    # Pinned, which torch keeps for the next time: copies run at the speed of the bus.
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8, device="cpu", pin_memory=has_gpu())
    return copy.copy_(_as_bytes(storage))
