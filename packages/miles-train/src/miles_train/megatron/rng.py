"""The random states of one rank as bytes: torch on this rank's devices, Megatron's tracker, Python and NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from miles_api import generators
from miles_api.errors import DataError

from .core import parallel_state, tensor_parallel
from .cpu import has_gpu

__all__ = ["layout", "load", "save"]

_FILE = "random-{rank:05d}.msgpack"


class _Saved(msgspec.Struct):
    layout: dict[str, int]
    torch: bytes
    cuda: bytes | None
    tracker: dict[str, bytes]
    shared: dict[str, Any]
    """Of Python and NumPy."""


def layout() -> dict[str, int]:
    """Return the parallel sizes that decide which rank draws what."""
    return {
        "ranks": dist.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }


def save(directory: str) -> None:
    """Write this rank's random states into `directory`; every rank calls it, each has a file of its own."""
    saved = _Saved(
        layout=layout(),
        torch=_bytes(torch.get_rng_state()),
        cuda=_bytes(torch.cuda.get_rng_state()) if has_gpu() else None,
        tracker={name: _bytes(state) for name, state in _tracker().get_states().items()},
        shared=generators.states(),
    )
    _path(directory).write_bytes(msgspec.msgpack.encode(saved))


def load(directory: str) -> None:
    """Restore what `save` wrote on this rank; `DataError` if there is none or it is of another parallel layout."""
    path = _path(directory)
    out = "--no-load-rng continues with fresh ones"
    try:
        saved = msgspec.msgpack.decode(path.read_bytes(), type=_Saved)
    except (OSError, msgspec.DecodeError) as error:
        raise DataError(f"{path}: this rank's random states cannot be read ({error}); {out}") from error
    if saved.layout != layout():
        raise DataError(
            f"{path}: the random states are those of {_words(saved.layout)}, this run has {_words(layout())}; {out}"
        )
    torch.set_rng_state(_tensor(saved.torch))
    if has_gpu() and saved.cuda is not None:
        torch.cuda.set_rng_state(_tensor(saved.cuda))
    _tracker().set_states({name: _tensor(state) for name, state in saved.tracker.items()})
    generators.restore(saved.shared)


def _path(directory: str) -> Path:
    return Path(directory, _FILE.format(rank=dist.get_rank()))


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _bytes(state: torch.Tensor) -> bytes:
    return state.cpu().numpy().tobytes()


def _tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)


def _words(sizes: dict[str, int]) -> str:
    return ", ".join(f"{name} {size}" for name, size in sizes.items())
