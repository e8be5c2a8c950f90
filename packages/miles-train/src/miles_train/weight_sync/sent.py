"""Weights that the trainer ranks send to the engines themselves, by tensor or broadcast, within an update session.

Nothing of them is left when a push is over. An engine that starts anew reads a snapshot that the trainer writes for it,
as long as the trainer still has those weights.
"""

from __future__ import annotations

import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_train.weight_sync.disk import IN_PLACE, DiskWay
from miles_train.weight_sync.engine import EngineGoneError, RefusedError, ask
from miles_train.weight_sync.frame import Gone, ask_all, without
from miles_train.weight_sync.plan import Plan, Receiver

if TYPE_CHECKING:
    from miles_api.services import Endpoint
    from miles_train.options import WeightSyncOptions
    from miles_train.weight_sync.frame import Push, Source

__all__ = ["SentWay"]

_NOT_FOUND, _BAD_REQUEST = 404, 400


class SentWay:
    """Opens a session on every engine, lets the trainer send, closes it."""

    def __init__(self, how: str, source: Source, folder: Path, options: WeightSyncOptions) -> None:
        """`how` is `tensor` or `broadcast`; snapshots are written below `folder`, which is removed at the end."""
        self._how, self._source, self._options = how, source, options
        self._disk = DiskWay(source, folder, options.pause_generation_mode)
        self._folder = folder
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="update-session")

    def prepare(self, push: Push) -> None:
        """Do nothing: tensors are gathered while they are sent."""

    def deliver(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Send everything to all engines, again to those that live if one that dies breaks it; return the dead."""
        gone = ask_all(self._pool, endpoints, _begin)
        while left := without(endpoints, gone):
            died = self._send(left, push)
            gone += died
            if not died or self._how == "tensor":
                break
        return gone + ask_all(self._pool, without(endpoints, gone), _end)

    def hand(self, endpoint: Endpoint, push: Push) -> bool:
        """Let one engine read a snapshot, which stays until the next push, if the trainer can still write it."""
        assert self._source.snapshot is not None
        if push.folder is None:
            folder = Path(tempfile.mkdtemp(dir=self._folder))
            if not self._source.snapshot(str(folder), push.version):
                shutil.rmtree(folder, ignore_errors=True)
                return False
            push.folder = folder
        self._disk.load(endpoint, push)
        return True

    def retire(self, push: Push) -> None:
        """Remove its snapshot, if there was one."""
        self._disk.retire(push)

    def close(self) -> None:
        """Remove the directory of snapshots."""
        self._pool.shutdown(wait=False)
        self._disk.close()

    def _send(self, endpoints: list[Endpoint], push: Push) -> Gone:
        assert self._source.send is not None
        sent = self._source.send(
            Plan(
                how=self._how,
                version=push.version,
                receivers=[Receiver(one.url, len(one.tp_ranks)) for one in endpoints],
                bucket_bytes=self._options.update_weight_buffer_size,
                hashed=push.due,
                flush=self._options.pause_generation_mode != IN_PLACE,
            )
        )
        if sent.refused:
            told = "; ".join(f"{who}: {what}" for who, what in sent.refused.items())
            raise ServiceError(f"weights {push.version!r} did not arrive, and the engines stay paused. {told}")
        push.checksums, push.dtype = sent.checksums, sent.dtype
        return [(one, EngineGoneError(sent.gone[one.url])) for one in endpoints if one.url in sent.gone]


def _begin(endpoint: Endpoint) -> None:
    """Open a session, where engines have them; one that a killed run left open is closed first."""
    for _ in range(2):
        try:
            ask(endpoint, "/begin_weight_update", {})
        except RefusedError as error:
            if error.status == _NOT_FOUND:
                return
            if error.status != _BAD_REQUEST or "already open" not in str(error):
                raise
            _end(endpoint)
        else:
            return
    raise ServiceError(f"engine {endpoint.url} does not open a weight-update session")


def _end(endpoint: Endpoint) -> None:
    try:
        ask(endpoint, "/end_weight_update", {})
    except RefusedError as error:
        if error.status != _NOT_FOUND:
            raise
