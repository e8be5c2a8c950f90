"""`/release_memory_occupation` and `/resume_memory_occupation`: an engine gives its memory up for a time.

As with SGLang an idle engine alone can release, weights come back without their values, and whoever resumes them pushes
new ones. Unlike there, which does not look, a request in between is refused, and twice the same is no error.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import msgspec

from miles_rollout.engines.local.errors import ReleasedError, RequestError
from miles_rollout.engines.protocol import MemoryRequest

if TYPE_CHECKING:
    import torch

    from miles_rollout.engines.local.engine import Engine

__all__ = ["Memory"]

_KINDS = ("weights", "kv_cache")
_ALSO_KNOWN = ("cuda_graph",)
"""SGLang's third tag, of which there is nothing here."""


class Memory:
    """What of an engine's memory is given up."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._released: set[str] = set()
        self._emptied: list[tuple[torch.Tensor, int]] = []
        """Weights without memory, and how many bytes they had."""

    def require(self) -> None:
        """Raise `ReleasedError` unless requests can be served."""
        if self._released:
            raise ReleasedError(f"the engine has released its memory ({', '.join(sorted(self._released))})")

    @property
    def has_weights(self) -> bool:
        """Whether the live weights may be read."""
        return "weights" not in self._released

    async def release(self, body: bytes) -> tuple[int, Any]:
        """Free the memory of these tags, or refuse while any request runs or waits."""
        tags = _tags(body)
        await asyncio.wrap_future(self._engine.call(lambda: self._release(tags)))
        return 200, {"success": True, "message": "", "released": sorted(self._released)}

    async def resume(self, body: bytes) -> tuple[int, Any]:
        """Take the memory of these tags again; weights hold no numbers until they are updated."""
        tags = _tags(body)
        await asyncio.wrap_future(self._engine.call(lambda: self._resume(tags)))
        return 200, {"success": True, "message": "", "released": sorted(self._released)}

    def _release(self, tags: set[str]) -> None:
        scheduler = self._engine.scheduler
        # Keys and values of prompts belong to the weights that computed them.
        if not scheduler.flush():
            raise RequestError("memory is released while no request runs or waits: abort them first")
        if "weights" in tags - self._released:
            found = {tensor.untyped_storage().data_ptr(): tensor for tensor in scheduler.model.tensors().values()}
            # What lies in a mapped file takes no memory of its own.
            tensors = [tensor for tensor in found.values() if tensor.untyped_storage().resizable()]
            self._emptied = [(tensor, tensor.untyped_storage().nbytes()) for tensor in tensors]
            for tensor in tensors:
                tensor.untyped_storage().resize_(0)
        self._released |= tags
        # A request that came in just now saw none of this.
        scheduler.released = bool(self._released)

    def _resume(self, tags: set[str]) -> None:
        if "weights" in tags & self._released:
            for tensor, size in self._emptied:
                tensor.untyped_storage().resize_(size)
                tensor.fill_(float("nan"))
            self._emptied = []
        self._released -= tags
        self._engine.scheduler.released = bool(self._released)


def _tags(body: bytes) -> set[str]:
    try:
        tags = msgspec.json.decode(body or b"{}", type=MemoryRequest).tags or _KINDS
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        raise RequestError(str(error)) from None
    unknown = set(tags) - {*_KINDS, *_ALSO_KNOWN}
    if unknown:
        raise RequestError(f"tags are {', '.join((*_KINDS, *_ALSO_KNOWN))}, not {', '.join(sorted(unknown))}")
    return {*tags} & {*_KINDS}
