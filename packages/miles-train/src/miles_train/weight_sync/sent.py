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
from miles_train.weight_sync.engine import EngineGoneError
from miles_train.weight_sync.plan import Plan
from miles_train.weight_sync.session import begin, end
from miles_train.weight_sync.way import Gone, ask_all, without

if TYPE_CHECKING:
    from miles_api.services import Endpoint
    from miles_train.options import WeightSyncOptions
    from miles_train.weight_sync.frame import Source
    from miles_train.weight_sync.way import Push

__all__ = ["SentWay"]


class SentWay:
    """Opens a session on every engine and lets the trainer send; closes it."""

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
        gone = ask_all(self._pool, endpoints, begin)
        while left := without(endpoints, gone):
            died = self._send(left, push)
            gone += died
            if not died or self._how == "tensor":
                break
        return gone

    def finish(self, endpoints: list[Endpoint], push: Push) -> Gone:  # noqa: ARG002  the session knows
        """Close the sessions; return the engines that died."""
        return ask_all(self._pool, endpoints, end)

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
                receivers=endpoints,
                bucket_bytes=self._options.update_weight_buffer_size,
                hashed=push.due,
                flush=self._options.pause_generation_mode != IN_PLACE,
            )
        )
        if sent.refused:
            told = "; ".join(f"{who}: {what}" for who, what in sent.refused.items())
            state = "keep the old ones" if push.staged else "stay paused"
            raise ServiceError(f"weights {push.version!r} did not arrive, and the engines {state}. {told}")
        push.checksums, push.dtype = sent.checksums, sent.dtype
        return [(one, EngineGoneError(sent.gone[one.url])) for one in endpoints if one.url in sent.gone]
