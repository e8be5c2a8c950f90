"""Weights through memory that trainer and engine share: CUDA IPC on one GPU, named shared memory on a CPU.

Only where a bucket lies goes over HTTP, as SGLang's `serialized_named_tensors`.
"""

from __future__ import annotations

import base64
import io
import os
import shutil
from contextlib import contextmanager, suppress
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
import torch.multiprocessing as mp

from miles_api.errors import ServiceError
from miles_train.weight_sync.link import FLATTENED, Bucket, Link

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["TensorLink"]

_PATH = "/update_weights_from_tensor"
_SHARED_MEMORY = Path("/dev/shm")
_STDERR = 2


class TensorLink(Link):
    """Two buffers, written in turn. Each engine gets its own handle: torch counts who has opened one."""

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        if device.type == "cuda":
            return super()._allocate(size, device)
        _require_room(size)
        _keep_descriptors()
        with _named_memory():
            return torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_using_filename_cpu(size))

    def _start(self, bucket: Bucket, flat: Tensor, body: dict[str, Any]) -> None:
        if flat.is_cuda:
            torch.cuda.current_stream().synchronize()
        metadata = _metadata(bucket)
        for receiver in self._receivers:
            handles = [_serialized(flat, metadata) for _ in receiver.tp_ranks]
            self._post(receiver, _PATH, {**body, "serialized_named_tensors": handles, "load_format": FLATTENED})


def _metadata(bucket: Bucket) -> list[SimpleNamespace]:
    """Say where each tensor lies. SGLang reads these attributes of any object, and may not know classes of ours."""
    entries, start = [], 0
    for name, tensor in bucket.tensors:
        end = start + tensor.nbytes
        shape = tuple(tensor.shape)
        entries.append(
            SimpleNamespace(name=name, shape=shape, dtype=tensor.dtype, start_idx=start, end_idx=end, numel=end - start)
        )
        start = end
    return entries


def _serialized(flat: Tensor, metadata: list[SimpleNamespace]) -> str:
    buffer = io.BytesIO()
    with _named_memory():
        ForkingPickler(buffer).dump({"flattened_tensor": flat, "metadata": metadata})
    return base64.b64encode(buffer.getvalue()).decode()


def _require_room(size: int) -> None:
    """Refuse what does not fit: who writes to shared memory that is not there is killed by SIGBUS."""
    usage = shutil.disk_usage(_SHARED_MEMORY)
    # A total of 0 is a file system without a limit.
    if usage.total and usage.free < size:
        raise ServiceError(
            f"{_SHARED_MEMORY} has {usage.free:,} bytes left, and weights travel through a buffer of {size:,} there: "
            "give it more (docker run --shm-size), lower --update-weight-buffer-size, or take another "
            "--update-weight-transfer-mode"
        )


def _keep_descriptors() -> None:
    """Let no child inherit what this process has open.

    Named memory has a manager, a process that lives as long as the last one that has opened any of it, be it an engine:
    whoever waits for this rank's end at the other side of a pipe would wait for that.
    """
    for entry in Path("/proc/self/fd").iterdir():
        if int(entry.name) > _STDERR:
            with suppress(OSError):  # the descriptor of the listing itself
                os.set_inheritable(int(entry.name), False)


@contextmanager
def _named_memory() -> Iterator[None]:
    """Share memory by name: a descriptor, torch's default, cannot be opened by a process that is no child of ours."""
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        mp.set_sharing_strategy(before)
