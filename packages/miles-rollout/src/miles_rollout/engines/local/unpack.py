"""Tensors that another process of this machine shares with us, out of SGLang's `serialized_named_tensors`.

SGLang's protocol has them in a pickle. A pickle can call whatever its reader lets it name, so this reader resolves a
dozen names and nothing else: tensors over shared memory of torch, their dtypes and shapes, and plain attributes. It
can also set attributes of whatever it gets hold of, so it gets hold of nothing that others use.
"""

from __future__ import annotations

import base64
import io
import pickle
import re
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.multiprocessing import reductions

from miles_rollout.engines.local.errors import CheckpointError

__all__ = ["FLATTENED", "received_dtype", "unpack"]

FLATTENED = "flattened_bucket"
"""The one `load_format` beside none: one flat tensor of bytes, and where in it each tensor lies."""
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_HANDLE = re.compile(rb"/torch_[\w-]+")


def received_dtype(name: str) -> torch.dtype:
    """Return the dtype of that name, with or without `torch.`, if weights may have it; raises `CheckpointError`."""
    plain = name.removeprefix("torch.")
    if plain not in _DTYPES:
        raise CheckpointError(f"dtype {name!r} is not one of {', '.join(_DTYPES)}")
    return getattr(torch, plain)


def unpack(serialized: list[str], load_format: str | None) -> dict[str, torch.Tensor]:
    """Return copies of the tensors by name; the first entry of `serialized` is ours, the others are of further ranks.

    Raises:
        CheckpointError: it is no such message, names what is not allowed in one, or what it shares is gone.
    """
    if load_format not in (None, FLATTENED):
        raise CheckpointError(f"load_format {load_format!r} is not supported: give {FLATTENED!r} or none")
    if not serialized:
        raise CheckpointError("serialized_named_tensors is empty")
    try:
        content = _Reader(io.BytesIO(base64.b64decode(serialized[0], validate=True))).load()
        return _of_bucket(content) if load_format == FLATTENED else {str(name): _copy(t) for name, t in content}
    except CheckpointError:
        raise
    except Exception as error:
        # Damaged bytes make a pickle fail in any way there is.
        raise CheckpointError(f"serialized_named_tensors cannot be read: {error!r}") from error


def _of_bucket(content: Any) -> dict[str, torch.Tensor]:
    flat = _plain(content["flattened_tensor"]).view(torch.uint8)
    tensors: dict[str, torch.Tensor] = {}
    for entry in content["metadata"]:
        start, end, shape = int(entry.start_idx), int(entry.end_idx), tuple(map(int, entry.shape))
        dtype = received_dtype(str(entry.dtype))
        if not 0 <= start <= end <= len(flat) or end - start != prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"tensor {entry.name} of shape {list(shape)} is not bytes {start} to {end} of its bucket"
            )
        # Each by itself: such memory comes back with the weights that it replaces, a whole bucket's is new each time.
        tensors[str(entry.name)] = flat[start:end].view(dtype).view(shape).clone()
    return tensors


def _copy(tensor: Any) -> torch.Tensor:
    """Copy what belongs to the sender, who writes the next bucket there as soon as we have answered."""
    return _plain(tensor).clone(memory_format=torch.contiguous_format)


def _plain(tensor: Any) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise CheckpointError(f"a {type(tensor).__name__} is no tensor")
    return tensor.detach()


class _Fixed(NamedTuple):
    """What a pickle may call and cannot change."""

    function: Any

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)


def _storage(kind: Any, manager: bytes, handle: bytes, size: int, dtype: Any = None) -> Any:
    if kind is not _UNTYPED or dtype is not None or not _HANDLE.fullmatch(handle):
        raise CheckpointError(f"{handle!r} is no shared memory of torch")
    return reductions.rebuild_storage_filename(torch.UntypedStorage, manager, handle, size)


_UNTYPED = _Fixed(torch.UntypedStorage)
_ALLOWED = {
    ("types", "SimpleNamespace"): SimpleNamespace,
    ("torch", "Size"): torch.Size,
    ("torch", "Tensor"): _Fixed(torch.Tensor),
    ("torch.storage", "UntypedStorage"): _UNTYPED,
    ("torch.nn.parameter", "Parameter"): _Fixed(torch.nn.Parameter),
    ("torch.multiprocessing.reductions", "rebuild_tensor"): _Fixed(reductions.rebuild_tensor),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"): _Fixed(_storage),
    ("torch.multiprocessing.reductions", "rebuild_typed_storage"): _Fixed(reductions.rebuild_typed_storage),
    ("torch.multiprocessing.reductions", "rebuild_storage_empty"): _Fixed(reductions.rebuild_storage_empty),
    **{("torch", name): getattr(torch, name) for name in (*_DTYPES, "uint8")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        if (module_name, global_name) not in _ALLOWED:
            raise CheckpointError(
                f"serialized_named_tensors may not name {module_name}.{global_name}: this engine takes CPU tensors in "
                "shared memory, made with torch.multiprocessing.set_sharing_strategy('file_system')"
            )
        return _ALLOWED[module_name, global_name]
