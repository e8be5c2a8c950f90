"""Weights through a directory: the trainer writes safetensors, every engine reads them and proves that it did.

In a run of one machine the directory lies in memory (/dev/shm) where there is room; on a cluster it is below the run
directory, which all nodes must see.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import MilesError, ServiceError
from miles_train.weight_sync.engine import EngineGoneError, ask
from miles_train.weight_sync.verify import Reference, as_metrics, check_engine, default_tolerance

if TYPE_CHECKING:
    from miles_api.services import Endpoint
    from miles_train.options import WeightSyncOptions
    from miles_train.weight_sync.verify import Finding

__all__ = ["DiskWeightSync", "Source", "make_folder"]

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "miles-weights-"
_PATIENCE = 600.0
"""Longer than a new engine takes to start; who replaces engines gives up earlier if they do not start."""


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


class Source(msgspec.Struct, frozen=True):
    """What the trainer does for a push; each call is made on all of its ranks."""

    export: Callable[[str, bool], dict[str, str]]
    """`export(directory, checksums)` writes a Hugging Face directory and returns the hashes asked for, by tensor."""
    score: Callable[[list[list[int]]], list[list[float]]]
    """Log-probs of each sequence's tokens after the first."""
    tokens: list[list[int]]
    """What is scored."""


class _Push(msgspec.Struct, frozen=True):
    """One complete set of weights."""

    version: str
    folder: Path
    reference: Reference | None
    """None for a push that is not checked."""


class DiskWeightSync:
    """Export once, load on every engine; each engine must then say and prove that it serves the new weights.

    `push` is for the run's main thread. `bring` and `replace` may be called from another one, which puts new engines in
    the place of dead ones: a push in which an engine dies waits for that.
    """

    def __init__(
        self,
        source: Source,
        endpoints: list[Endpoint],
        folder: Path,
        options: WeightSyncOptions,
        *,
        patience: float = _PATIENCE,
    ) -> None:
        """`folder` is removed at the end; a push waits `patience` seconds for new engines, 0 where none will come."""
        self._source = source
        self._endpoints = list(endpoints)
        self._folder = folder
        # Elsewhere nobody else looks for what is left, and not every file system can do this.
        self._hold = _held(folder) if folder.parent == _SHARED_MEMORY else None
        self._options = options
        self._patience = patience
        self._pool = ThreadPoolExecutor(max(len(endpoints), 1), thread_name_prefix="weight-sync")
        # Held while engines load, so that none gets two pushes at once; a push that waits for a new engine lets go.
        self._changed = threading.Condition()
        self._current: _Push | None = None
        self._served: dict[str, tuple[_Push, Finding | None]] = {}
        """By the URL of each engine, what it got last and what the check saw."""
        self._given_up: MilesError | None = None
        self._check_next = True

    def push(self, version: int) -> dict[str, float]:
        """Bring the trainer's current weights, the `version`-th, to every engine; return metrics of the check.

        They are empty for a push that is not checked. The first one is; which others are follows from `version` alone.
        Weights are written beside those of the last push and take their place when they are complete: a push that fails
        before leaves every engine with the old ones.

        Raises:
            ServiceError: an engine refuses the weights, serves others, or died and was not replaced in time.
        """
        with self._changed:
            self._current, old = self._written(version), self._current
            if old is not None:
                shutil.rmtree(old.folder, ignore_errors=True)
            self._check_next = False
            self._serve_all(self._current)
            findings = [finding for _, finding in self._served.values() if finding]
            return as_metrics(findings) if findings else {}

    def bring(self, endpoint: Endpoint) -> None:
        """Load the last pushed weights on one new engine, and verify it as far as that push was checked.

        Before the first push there is nothing to do. Raises as `push` does, and `EngineGoneError` (a `ServiceError`) at
        once if the engine does not answer.
        """
        with self._changed:
            push = self._current
            if push is None or self._has(endpoint, push):
                return
            self._serve(endpoint, push)
            self._changed.notify_all()

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        """Push to `new` in the place of `old` from now on, and check the next push whatever the interval.

        `bring` gives it the weights of the last one.
        """
        with self._changed:
            self._check_next = True
            self._endpoints = [new if endpoint.url == old.url else endpoint for endpoint in self._endpoints]
            self._served.pop(old.url, None)
            self._changed.notify_all()

    def give_up(self, error: MilesError) -> None:
        """Say that dead engines will not be replaced any more: a push that waits for one raises `error`."""
        with self._changed:
            self._given_up = error
            self._changed.notify_all()

    def served(self, version: int) -> str:
        """Return how engines call the weights of that push: by the same number."""
        return str(version)

    def close(self) -> None:
        """Remove the directory."""
        self._pool.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._hold is not None:
            os.close(self._hold)
            self._hold = None

    def _written(self, version: int) -> _Push:
        """Export into a fresh directory; nothing of it is left if that fails."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        interval = self._options.weight_check_interval
        due = self._check_next or (interval > 0 and version % interval == 0)
        try:
            checksums = self._source.export(str(folder), due)
            reference = self._reference(str(version), folder, checksums) if due else None
            return _Push(str(version), folder, reference)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _reference(self, version: str, folder: Path, checksums: dict[str, str]) -> Reference:
        given = self._options.weight_check_tolerance
        return Reference(
            version=version,
            checksums=checksums,
            tokens=self._source.tokens,
            log_probs=self._source.score(self._source.tokens),
            tolerance=default_tolerance(folder) if given is None else given,
        )

    def _serve_all(self, push: _Push) -> None:
        """Load on all engines, and on those that come in the place of engines that die meanwhile."""
        waiting, deadline = self._endpoints, time.monotonic() + self._patience
        while waiting:
            loads = [(endpoint, self._pool.submit(self._serve, endpoint, push)) for endpoint in waiting]
            wait([load for _, load in loads])
            gone: list[tuple[Endpoint, EngineGoneError]] = []
            for endpoint, load in loads:
                try:
                    load.result()
                except EngineGoneError as error:
                    gone.append((endpoint, error))
            waiting = self._replacements(gone, push, deadline)

    def _replacements(
        self, gone: list[tuple[Endpoint, EngineGoneError]], push: _Push, deadline: float
    ) -> list[Endpoint]:
        """Wait until no engine in `gone` is listed; return those listed now that have not been given this push yet."""
        while left_over := [error for endpoint, error in gone if self._lists(endpoint)]:
            if self._given_up is not None:
                raise self._given_up
            left = deadline - time.monotonic()
            if left <= 0:
                after = f", and nothing took its place within {self._patience:g} s" if self._patience else ""
                raise ServiceError(f"{left_over[0]}{after}") from left_over[0]
            self._changed.wait(left)
        return [endpoint for endpoint in self._endpoints if not self._has(endpoint, push)]

    def _lists(self, endpoint: Endpoint) -> bool:
        # Not by equality: with fixed ports an engine comes back at the URL of the one that it replaces.
        return any(listed is endpoint for listed in self._endpoints)

    def _has(self, endpoint: Endpoint, push: _Push) -> bool:
        return endpoint.url in self._served and self._served[endpoint.url][0] is push

    def _serve(self, endpoint: Endpoint, push: _Push) -> None:
        """Load on one engine, and verify it if the push is checked."""
        body = {"model_path": str(push.folder), "weight_version": push.version}
        answer = ask(endpoint, "/update_weights_from_disk", body)
        if not answer.get("success"):
            raise ServiceError(f"engine {endpoint.url} refused /update_weights_from_disk: {answer}")
        served = ask(endpoint, "/model_info").get("weight_version")
        if served != push.version:
            raise ServiceError(f"engine {endpoint.url} took weights {push.version!r} but says it serves {served!r}")
        self._served[endpoint.url] = (push, check_engine(endpoint, push.reference) if push.reference else None)
