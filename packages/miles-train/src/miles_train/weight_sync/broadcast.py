"""Weights through a process group of one trainer rank and all engine ranks: NCCL on GPUs, gloo on a CPU.

The group outlives a push. An engine that dies breaks it for all, so the others get that push again, through a new one.
"""

from __future__ import annotations

import secrets
import socket
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urlsplit

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from miles_train.weight_sync.engine import EngineGoneError, RefusedError, ask
from miles_train.weight_sync.link import FLATTENED, Bucket, Link

if TYPE_CHECKING:
    from torch import Tensor

    from miles_api.services import Endpoint

__all__ = ["BroadcastLink"]

_PATH = "/update_weights_from_distributed"
_TIMEOUT = timedelta(seconds=120)
"""For all to meet, and for one bucket; SGLang waits longer, and ends when this rank gives up."""


class BroadcastLink(Link):
    """Sends a bucket as one flat tensor of bytes to all engines at once."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self._backend = backend
        self._group: Any = None
        self._store: Any = None
        self._name = ""
        self._members: list[Endpoint] = []
        self._work: Any = None

    def open(self, receivers: list[Endpoint]) -> None:
        """Send to these from now on, through a new group if the last one had other members or broke."""
        super().open(receivers)
        if not receivers or (self._group is not None and self._members == receivers):
            return
        self._leave()
        self._meet(receivers)

    def wait(self) -> None:
        """Wait as `Link` does; one engine that fails ends the push for all."""
        work, self._work = self._work, None
        problem = ""
        if work is not None:
            try:
                work.wait()
            except RuntimeError as error:
                problem = f"the broadcast failed: {error}"
                # Engines that wait for one that has died hear of it only by our leaving.
                self._drop()
        super().wait()
        if problem and not self.gone and not self.refused:
            self.refused["the process group"] = problem
        self._settle()

    def close(self) -> None:
        """Leave the group."""
        self._drop()
        super().close()

    def _start(self, bucket: Bucket, flat: Tensor, body: dict[str, Any]) -> None:
        names = [name for name, _ in bucket.tensors]
        dtypes = [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors]
        shapes = [list(tensor.shape) for _, tensor in bucket.tensors]
        body = {**body, "names": names, "dtypes": dtypes, "shapes": shapes}
        for receiver in self._receivers:
            self._post(receiver, _PATH, {**body, "group_name": self._name, "load_format": FLATTENED})
        self._work = dist.broadcast(flat, src=0, group=self._group, async_op=True)

    def _settle(self) -> None:
        """Whoever died, the others did not get everything: what they refused for that reason is not their fault."""
        if self.gone:
            self.refused = {}
            self._receivers = []
            self._drop()

    def _meet(self, receivers: list[Endpoint]) -> None:
        try:
            host = _own_address(receivers[0].url)
        except OSError as error:
            self.gone[receivers[0].url] = f"engine {receivers[0].url} cannot be reached: {error}"
            self._settle()
            return
        self._name = f"miles-weights-{secrets.token_hex(4)}"
        self._members = list(receivers)
        size = 1 + sum(len(receiver.tp_ranks) for receiver in receivers)
        self._store = _store_at(host, size)
        body = {"master_address": host, "master_port": self._store.port, "world_size": size, "backend": self._backend}
        offset = 1
        for receiver in receivers:
            place = {"rank_offset": offset, "group_name": self._name}
            self._post(receiver, "/init_weights_update_group", {**body, **place})
            offset += len(receiver.tp_ranks)
        problem = self._form(size)
        if problem:
            self._drop()
        Link.wait(self)
        if problem and not self.gone and not self.refused:
            self.refused["the process group"] = problem
        self._settle()

    def _form(self, size: int) -> str:
        """Make the group, whose other members are told already; return what went wrong."""
        try:
            # The helper behind init_process_group and new_group: neither can make a group of processes of two worlds.
            self._group, _ = c10d._new_process_group_helper(
                size,
                0,
                [],
                c10d.Backend(self._backend),
                dist.PrefixStore(self._name, self._store),
                group_name=c10d.GroupName(self._name),
                timeout=_TIMEOUT,
            )
        except RuntimeError as error:
            return f"the process group did not form: {error}"
        c10d._world.pg_group_ranks[cast("dist.ProcessGroup", self._group)] = {index: index for index in range(size)}
        return ""

    def _leave(self) -> None:
        """Leave the last group, and let those of its engines that live leave it too."""
        members, self._members = self._members, []
        if not members:
            return
        self._drop()
        for receiver in members:
            try:
                ask(receiver, "/destroy_weights_update_group", {"group_name": self._name})
            except (EngineGoneError, RefusedError):
                # It has died, or did not get as far as joining.
                continue

    def _drop(self) -> None:
        group, self._group, self._store = self._group, None, None
        if group is not None:
            dist.destroy_process_group(group)


def _store_at(host: str, size: int) -> dist.TCPStore:
    """Open the store where a group of this size meets, at this address alone: it asks nobody for a key."""
    listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    port = listener.getsockname()[1]
    return dist.TCPStore(
        host,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=_TIMEOUT,
        master_listen_fd=listener.detach(),
    )


def _own_address(url: str) -> str:
    """Return the address of this machine as the engine at `url` sees it. Raises `OSError`."""
    place = urlsplit(url)
    with socket.create_connection((place.hostname, place.port), timeout=10) as connection:
        return connection.getsockname()[0]
