"""The process groups through which trainer ranks broadcast weights: rank 0 sends, the engines receive."""

from __future__ import annotations

from datetime import timedelta
from math import prod
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.unpack import FLATTENED, received_dtype

__all__ = ["UpdateGroups"]

_TIMEOUT = timedelta(seconds=120)
"""For all to meet, and for one broadcast: an engine that waits longer has lost its trainer."""


class UpdateGroups:
    """The groups that this engine is in, by name. Every method blocks: call it in a thread."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}

    def join(self, name: str, address: tuple[str, int], rank: int, size: int, backend: str) -> None:
        """Meet the trainer and the other engines. Raises `CheckpointError`."""
        if backend != "gloo":
            raise CheckpointError(f"backend {backend!r} needs GPUs: this engine has none, give 'gloo'")
        if name in self._groups:
            raise CheckpointError(f"the group {name!r} exists already")
        try:
            store = dist.TCPStore(*address, size, is_master=False, timeout=_TIMEOUT)
            # The helper behind init_process_group and new_group: neither can make a group of processes of two worlds.
            group, _ = c10d._new_process_group_helper(
                size,
                rank,
                [],
                c10d.Backend(backend),
                dist.PrefixStore(name, store),
                group_name=c10d.GroupName(name),
                timeout=_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"the group {name!r} did not form: {error}") from error
        c10d._world.pg_group_ranks[cast("dist.ProcessGroup", group)] = {index: index for index in range(size)}
        self._groups[name] = group

    def receive(
        self, name: str, names: list[str], dtypes: list[str], shapes: list[list[int]], load_format: str | None
    ) -> dict[str, torch.Tensor]:
        """Receive one bucket. Raises `CheckpointError` if it does not arrive; what the others got is not known then."""
        if name not in self._groups:
            raise CheckpointError(f"the group {name!r} does not exist: call /init_weights_update_group first")
        if load_format not in (None, FLATTENED):
            raise CheckpointError(f"load_format {load_format!r} is not supported: give {FLATTENED!r} or none")
        kinds = [received_dtype(dtype) for dtype in dtypes]
        if not len(names) == len(kinds) == len(shapes):
            raise CheckpointError("names, dtypes and shapes are not of one length")
        group = self._groups[name]
        try:
            if load_format == FLATTENED:
                return _flattened(group, names, kinds, shapes)
            tensors = {n: torch.empty(shape, dtype=kind) for n, kind, shape in zip(names, kinds, shapes, strict=True)}
            for tensor in tensors.values():
                dist.broadcast(tensor, src=0, group=group)
        except RuntimeError as error:
            raise CheckpointError(f"the weights did not arrive through the group {name!r}: {error}") from error
        return tensors

    def leave(self, name: str) -> None:
        """Leave a group, which may be broken. Raises `CheckpointError` if there is none of this name."""
        if name not in self._groups:
            raise CheckpointError(f"the group {name!r} does not exist")
        dist.destroy_process_group(self._groups.pop(name))


def _flattened(
    group: Any, names: list[str], kinds: list[torch.dtype], shapes: list[list[int]]
) -> dict[str, torch.Tensor]:
    sizes = [prod(shape) * kind.itemsize for kind, shape in zip(kinds, shapes, strict=True)]
    flat = torch.empty(sum(sizes), dtype=torch.uint8)
    dist.broadcast(flat, src=0, group=group)
    parts = flat.split(sizes)
    return {n: part.view(kind).view(shape) for n, part, kind, shape in zip(names, parts, kinds, shapes, strict=True)}
