"""What Megatron-Core needs in order to run where there is no GPU, in one place.

Megatron assumes CUDA in a few dozen lines: buffers on the current device, the CUDA random generator, names of tensor
types. The shims below answer those lines with the CPU's equivalents. They touch private names, so the version is pinned
and checked. Nothing here is used on a machine with a GPU.
"""

# ruff: noqa: ARG005  a stand-in takes the arguments of what it stands for

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import logging
import queue
import warnings
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._device import _device_constructors

from miles_api.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MEGATRON_VERSION", "apply_cpu_shims", "has_gpu"]

MEGATRON_VERSION = "0.16.1"
"""The Megatron-Core release whose private names the shims were written against."""

_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros", "empty_like", "zeros_like",
              "ones_like", "full_like")  # fmt: skip
_CPU = torch.device("cpu")


def has_gpu() -> bool:
    """Say whether this process trains on CUDA with NCCL; if not, it trains on the CPU with gloo."""
    return torch.cuda.is_available()


def apply_cpu_shims() -> None:
    """Make Megatron-Core importable and usable without a GPU.

    Call before anything imports `megatron`; `miles_train.megatron.core` does. Does nothing on a machine with a GPU and
    nothing the second time. Raises ConfigError when the installed Megatron-Core is not the pinned version.
    """
    if has_gpu():
        return
    _apply()


@functools.cache
def _apply() -> None:
    found = importlib.metadata.version("megatron-core")
    if found != MEGATRON_VERSION:
        raise ConfigError(
            f"training on a CPU needs megatron-core {MEGATRON_VERSION}, installed is {found}: "
            "the CPU shims touch names that other versions may not have"
        )
    _shim_devices()
    _shim_random()
    with warnings.catch_warnings():
        # Megatron says at import that Apex and Transformer Engine are missing: here that is the point
        warnings.simplefilter("ignore")
        _shim_megatron()


def _replace(owner: Any, **stand_ins: Any) -> None:
    """Put stand-ins in the place of a module's or class's own; they need not have the declared types."""
    for name, stand_in in stand_ins.items():
        setattr(owner, name, stand_in)


def _shim_devices() -> None:
    """Answer "the current CUDA device" with the CPU, for buffers, streams and tensor type names."""
    _replace(
        torch.cuda,
        current_device=lambda: _CPU,
        synchronize=lambda device=None: None,
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda device=None: _Stream(),
        stream=lambda stream: contextlib.nullcontext(),
    )
    _replace(torch.Tensor, cuda=lambda self, *args, **kwargs: self)
    # `with torch.device(…)` recognises the factories it redirects by identity and caches them at its first use: let it
    # see the real ones, or transformers, which builds models on the meta device, loads garbage
    _device_constructors()
    _replace(torch, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})
    _replace(torch.Tensor, type=_cuda_type_names(torch.Tensor.type))


def _shim_random() -> None:
    """Let the CUDA generator be the CPU's, so that Megatron's RNG tracker forks a generator that exists."""
    _replace(
        torch.cuda,
        get_rng_state=lambda device="cuda": torch.get_rng_state(),
        set_rng_state=lambda new_state, device="cuda": torch.set_rng_state(new_state),
        manual_seed=torch.manual_seed,
    )


def _shim_megatron() -> None:
    # not at the top: Megatron must be imported after the shims of torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: PLC0415
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: PLC0415
    from megatron.core.tensor_parallel import random  # noqa: PLC0415

    _replace(
        random,
        _get_cuda_rng_state=lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state(),
        _set_cuda_rng_state=lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state),
    )
    # it warns at each fork that the CPU generator moved, which is what forking it means here
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    # a save that is not asynchronous puts and gets in one process; Megatron starts another one for the queue, which
    # imports the main module again and takes seconds
    _replace(filesystem_async, _results_queue=queue.Queue())
    _shim_sharded_load(DistributedOptimizer)


def _shim_sharded_load(distributed_optimizer: Any) -> None:
    """Let the sharded optimizer load moments into torch's AdamW, whose `step` the checkpoint does not hold."""
    original = distributed_optimizer._set_main_param_and_optimizer_states

    @functools.wraps(original)
    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        kept = self._get_main_param_and_optimizer_states(model_param)
        original(self, model_param, {**{name: kept[name] for name in kept.keys() - tensors.keys()}, **tensors})

    _replace(distributed_optimizer, _set_main_param_and_optimizer_states=set_states)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs:
            kwargs.pop("pin_memory", None)
            device = kwargs.get("device")
            if device is not None and str(device).startswith("cuda"):
                kwargs["device"] = _CPU
        return factory(*args, **kwargs)

    return create


def _cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original(self, *args, **kwargs)
        # gradient clipping and the distributed optimizer compare this name with 'torch.cuda.FloatTensor'
        return original(self).replace("torch.", "torch.cuda.", 1)

    return tensor_type


class _Stream:
    """A stream on which everything has already happened. A class, because libraries subclass and isinstance it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> _Event:
        return event or _Event()


class _Event:
    """An event that has already happened."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True
