"""Weights that a trainer sends: a session collects them, its end puts all of them in place between two steps.

Requests go on meanwhile: whoever pauses for an update needs to do so for the end alone, by when everything has been
read and computed. An update that fails at any point leaves the engine with the weights it had.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from miles_rollout.engines.local.errors import CheckpointError, UnsupportedModelError
from miles_rollout.engines.local.group import UpdateGroups
from miles_rollout.engines.local.unpack import unpack
from miles_rollout.engines.local.weights import completed
from miles_rollout.engines.protocol import (
    BeginUpdateRequest,
    DestroyGroupRequest,
    InitGroupRequest,
    UpdateFromDistributedRequest,
    UpdateFromTensorRequest,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    import torch

    from miles_rollout.engines.local.model import SlotModel
    from miles_rollout.engines.local.weights import Weights
    from miles_rollout.engines.protocol import UpdateFromDiskRequest

__all__ = ["WeightUpdates"]

T = TypeVar("T")
Answer = tuple[int, Any]
_OUTSIDE = "must run between begin_weight_update() and end_weight_update()"


class _Session:
    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.version: str | None = None
        self.aborts = False
        self.directory: Path | None = None
        """What it has got instead of tensors, or before them."""
        self.staged: tuple[Weights, Callable[[], None]] | None = None
        """What the end puts in place, if everything is there already."""

    def keep(self, directory: Path, commit: Callable[[], None], request: UpdateFromDiskRequest) -> None:
        """Keep what was read from a directory for the end."""
        self.tensors, self.directory, self.staged = {}, directory, (directory, commit)
        self.note(request)

    def note(self, request: UpdateFromDiskRequest | UpdateFromTensorRequest | UpdateFromDistributedRequest) -> None:
        """Take what a request says of the update as a whole."""
        self.version = request.weight_version or self.version
        self.aborts |= request.abort_all_requests


class WeightUpdates:
    """The endpoints of updates that are sent. `put` gets them all at the end of a session."""

    def __init__(
        self,
        model: SlotModel,
        current: Callable[[], Weights],
        put: Callable[[Callable[[], None], Weights, str | None, bool], Awaitable[None]],
        lock: asyncio.Lock,
    ) -> None:
        """`put(commit, weights, version, aborts)` runs `commit` between two steps; `lock` is held for every update."""
        self._model, self._current, self._put, self._lock = model, current, put, lock
        self._groups = UpdateGroups()
        self.session: _Session | None = None
        """The one that is open. What was asked for within one counts for no other."""

    async def begin(self, body: bytes) -> Answer:
        """Open a session, in the place of an open one if asked to."""
        try:
            anew = msgspec.json.decode(body or b"{}", type=BeginUpdateRequest).anew
        except msgspec.DecodeError as error:
            return _failed(str(error))
        if self.session is not None and not anew:
            return _failed("a weight-update session is already open; call end_weight_update() first")
        self.session = _Session()
        return _done("Success")

    async def end(self, _: bytes) -> Answer:
        """Put what the session has collected in place, as a whole or not at all."""
        async with self._lock:
            session, self.session = self.session, None
            if session is None:
                return _failed("no weight-update session is open; call begin_weight_update() first")
            if session.staged is None and not session.tensors:
                return _done("Success")
            try:
                weights, commit = session.staged or await asyncio.to_thread(self._stage, session)
            except (CheckpointError, UnsupportedModelError) as error:
                return _failed(str(error))
            await self._put(commit, weights, session.version, session.aborts)
        return _done("Success")

    async def from_tensor(self, body: bytes) -> Answer:
        """Take tensors out of shared memory."""
        return await self._take(
            body, UpdateFromTensorRequest, lambda r: unpack(r.serialized_named_tensors, r.load_format)
        )

    async def from_distributed(self, body: bytes) -> Answer:
        """Receive tensors that a trainer rank broadcasts."""

        def receive(r: UpdateFromDistributedRequest) -> dict[str, torch.Tensor]:
            return self._groups.receive(r.group_name, r.names, r.dtypes, r.shapes, r.load_format)

        return await self._take(body, UpdateFromDistributedRequest, receive)

    async def init_group(self, body: bytes) -> Answer:
        """Join the group of a trainer rank and all engines."""

        def join(r: InitGroupRequest) -> None:
            self._groups.join(r.group_name, (r.master_address, r.master_port), r.rank_offset, r.world_size, r.backend)

        return await _tried(body, InitGroupRequest, join)

    async def destroy_group(self, body: bytes) -> Answer:
        """Leave such a group."""
        return await _tried(body, DestroyGroupRequest, lambda r: self._groups.leave(r.group_name))

    async def _take(self, body: bytes, kind: type[Any], read: Callable[[Any], dict[str, torch.Tensor]]) -> Answer:
        session = self.session
        if session is None:
            return _failed(f"the update {_OUTSIDE}")

        def add(request: UpdateFromTensorRequest | UpdateFromDistributedRequest) -> None:
            session.tensors.update(read(request))
            session.staged = None
            session.note(request)
            # The version comes with the last tensors.
            if request.weight_version:
                self._stage_ahead(session)

        async with self._lock:
            if session is not self.session:
                return _failed(f"the update {_OUTSIDE}")
            return await _tried(body, kind, add)

    def _stage_ahead(self, session: _Session) -> None:
        """Stage what was sent, if it is everything: what is wrong, or missing, the end of the session says."""
        with suppress(CheckpointError, UnsupportedModelError):
            session.staged = session.tensors, self._model.stage(session.tensors)

    def _stage(self, session: _Session) -> tuple[Weights, Callable[[], None]]:
        """Stage what was sent; if that is not everything, with the rest as it is now."""
        sent = session.tensors
        try:
            return sent, self._model.stage(sent)
        except CheckpointError as problem:
            try:
                weights = completed(sent, session.directory or self._current())
            except CheckpointError:
                raise problem from None
            return weights, self._model.stage(weights)


async def _tried(body: bytes, kind: type[T], function: Callable[[T], object]) -> Answer:
    """Decode a body and do what it asks in a thread."""
    try:
        request = msgspec.json.decode(body or b"{}", type=kind)
        await asyncio.to_thread(function, request)
    except (msgspec.DecodeError, CheckpointError) as error:
        return _failed(str(error))
    return _done("Success")


def _done(message: str) -> Answer:
    return 200, {"success": True, "message": message}


def _failed(message: str) -> Answer:
    return 400, {"success": False, "message": message}
