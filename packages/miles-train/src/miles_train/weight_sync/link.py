"""What the two ways to send tensors share: one bucket under way to all engines while the next one is gathered."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import msgspec
import torch
from torch import Tensor

from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import EngineGoneError
from miles_train.weight_sync.session import within

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from miles_api.services import Endpoint

__all__ = ["FLATTENED", "Bucket", "Link", "in_buckets"]

FLATTENED = "flattened_bucket"
"""SGLang's `load_format` for one flat tensor that holds many."""


class Bucket(msgspec.Struct, frozen=True):
    """Tensors of one dtype that travel together."""

    tensors: list[tuple[str, Tensor]]
    bytes: int

    def pack(self, flat: Tensor) -> None:
        """Copy all tensors, one after the other, into a flat one of this many bytes."""
        dtype = self.tensors[0][1].dtype
        torch.cat([tensor.reshape(-1) for _, tensor in self.tensors], out=flat.view(dtype))


def in_buckets(named: Iterable[tuple[str, Tensor]], most: int) -> Iterator[Bucket]:
    """Group tensors of one dtype in the order in which they come into buckets of at most `most` bytes.

    A larger tensor gets a bucket of its own.
    """
    held: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        if held and (size + tensor.nbytes > most or tensor.dtype != held[0][1].dtype):
            yield Bucket(held, size)
            held, size = [], 0
        held.append((name, tensor))
        size += tensor.nbytes
    if held:
        yield Bucket(held, size)


class Link:
    """From this rank to the engines. After a `put` the bucket travels; the next `put` packs its own and then waits."""

    path = ""

    def __init__(self) -> None:
        self.gone: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self._receivers: list[Endpoint] = []
        self._under_way: dict[str, Future[Any]] = {}
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="send-weights")
        self._buffers: list[Tensor | None] = [None, None]

    def open(self, receivers: list[Endpoint]) -> None:
        """Send to these from now on; nothing is gone or refused yet."""
        self.gone, self.refused, self._receivers = {}, {}, list(receivers)

    def put(self, bucket: Bucket, body: dict[str, Any]) -> None:
        """Send a bucket with the fields of `body`; without effect once there is nobody to send to."""
        if not self._receivers:
            return
        # What the engines still read lies in the other buffer.
        self._buffers.reverse()
        flat = self._room(bucket)
        bucket.pack(flat)
        self.wait()
        if self._receivers:
            self._start(bucket, flat, body)

    def wait(self) -> None:
        """Wait until the bucket under way has arrived everywhere; note who died and who refused it."""
        under_way, self._under_way = self._under_way, {}
        wait(under_way.values())
        for url, future in under_way.items():
            error = future.exception()
            if isinstance(error, EngineGoneError):
                self.gone[url] = str(error)
            elif isinstance(error, ServiceError):
                self.refused[url] = str(error)
            elif error is not None:
                raise error
        self._receivers = [] if self.refused else [one for one in self._receivers if one.url not in self.gone]

    def close(self) -> None:
        """Let go of buffers and threads."""
        self._pool.shutdown()
        self._buffers = [None, None]

    def _room(self, bucket: Bucket) -> Tensor:
        """Return a flat tensor of the bucket's bytes where the engines can get at it."""
        buffer = self._buffers[0]
        if buffer is None or len(buffer) < bucket.bytes:
            buffer = self._buffers[0] = self._allocate(bucket.bytes, bucket.tensors[0][1].device)
        return buffer[: bucket.bytes]

    def _allocate(self, size: int, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=device)

    def _start(self, bucket: Bucket, flat: Tensor, body: dict[str, Any]) -> None:
        raise NotImplementedError

    def _post(self, receiver: Endpoint, path: str, body: dict[str, Any]) -> None:
        self._under_way[receiver.url] = self._pool.submit(_post, receiver, path, body)


def _post(receiver: Endpoint, path: str, body: dict[str, Any]) -> None:
    answer = within(receiver, path, body)
    if not answer.get("success"):
        raise ServiceError(f"engine {receiver.url} refused {path}: {answer}")
