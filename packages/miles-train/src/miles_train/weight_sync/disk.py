"""Weights through a directory: the trainer writes safetensors, every engine reads them and proves that it did.

In a run of one machine the directory lies in memory (/dev/shm) where there is room; on a cluster it is below the run
directory, which all nodes must see.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import ask
from miles_train.weight_sync.session import begin, end
from miles_train.weight_sync.way import Gone, ask_all, without

if TYPE_CHECKING:
    from miles_api.services import Endpoint
    from miles_train.weight_sync.frame import Source
    from miles_train.weight_sync.way import Push

__all__ = ["IN_PLACE", "DiskWay", "make_folder"]

IN_PLACE = "in_place"
"""The mode of pausing in which requests keep what was computed for them, so nothing can be forgotten."""

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "miles-weights-"


def make_folder(weight_bytes: int, shared: Path | None, *, fallback: Path) -> Path:
    """Create the directory that weights travel through, and remove those of runs that were killed.

    It lies in `shared` if given, else in memory if the weights fit twice (new ones are complete before the old ones are
    removed), else in `fallback`. Both belong to this run alone. All sizes are in bytes.
    """
    parent = shared or fallback
    for left in parent.glob(f"{_PREFIX}*"):
        shutil.rmtree(left, ignore_errors=True)
    if shared is None and _SHARED_MEMORY.is_dir():
        for left in filter(_is_left, _SHARED_MEMORY.glob(f"{_PREFIX}*")):
            shutil.rmtree(left, ignore_errors=True)
        if shutil.disk_usage(_SHARED_MEMORY).free > 2 * weight_bytes:
            parent = _SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


def _is_left(folder: Path) -> bool:
    """Say whether the run of a folder is gone, be it one of another container, whose process ids mean nothing here."""
    if Path("/proc", folder.name.removeprefix(_PREFIX).partition("-")[0]).exists():
        return False
    try:
        os.close(_held(folder))
    except OSError:
        return False
    return True


def _held(folder: Path) -> int:
    """Take a folder for this process, until the descriptor is closed. Raises `OSError` if it is taken, or gone."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


class DiskWay:
    """Export once, load on every engine.

    Weights are written beside those of the last push and take their place when they are complete: a push that fails
    before leaves every engine with the old ones. They stay until the next, for engines that start anew.
    """

    def __init__(self, source: Source, folder: Path, mode: str) -> None:
        """`folder` is removed at the end; `mode` is in which engines are paused."""
        self._source = source
        self._folder = folder
        # Elsewhere nobody else looks for what is left, and not every file system can do this.
        self._hold = _held(folder) if folder.parent == _SHARED_MEMORY else None
        self._flush = mode != IN_PLACE
        self._pool = ThreadPoolExecutor(32, thread_name_prefix="load-weights")

    def prepare(self, push: Push) -> None:
        """Export into a fresh directory; nothing of it is left if that fails."""
        push.folder = Path(tempfile.mkdtemp(dir=self._folder))
        try:
            push.checksums = self._source.export(str(push.folder), push.due)
            push.dtype = msgspec.json.decode((push.folder / "config.json").read_bytes()).get("dtype", "")
        except BaseException:
            shutil.rmtree(push.folder, ignore_errors=True)
            raise

    def deliver(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Let all engines read the directory at once; return those that died."""
        gone = ask_all(self._pool, endpoints, begin) if push.staged else []
        return gone + ask_all(self._pool, without(endpoints, gone), lambda endpoint: self.load(endpoint, push))

    def finish(self, endpoints: list[Endpoint], push: Push) -> Gone:
        """Let engines that only staged what they read serve it; return those that died."""
        return ask_all(self._pool, endpoints, end) if push.staged else []

    def hand(self, endpoint: Endpoint, push: Push) -> bool:
        """Let one engine read it."""
        self.load(endpoint, push)
        return True

    def load(self, endpoint: Endpoint, push: Push) -> None:
        """Let one engine read the directory of a push. Raises `ServiceError`."""
        body = {"model_path": str(push.folder), "weight_version": push.version, "flush_cache": self._flush}
        answer = ask(endpoint, "/update_weights_from_disk", body)
        if not answer.get("success"):
            raise ServiceError(f"engine {endpoint.url} refused /update_weights_from_disk: {answer}")

    def retire(self, push: Push) -> None:
        """Remove the directory of a push."""
        if push.folder is not None:
            shutil.rmtree(push.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all directories."""
        self._pool.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None
