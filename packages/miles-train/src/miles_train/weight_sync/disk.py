"""Weights through a directory: the trainer writes safetensors, every engine reads them.

In a run of one machine the directory lies in memory (/dev/shm) where there is room; on a cluster it is below the run
directory, which all nodes must see.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.services import Endpoint

__all__ = ["DiskWeightSync", "ask", "make_folder"]

_TIMEOUT = 600.0
_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = "miles-weights-"


def make_folder(weight_bytes: int, shared: Path | None, *, fallback: Path) -> Path:
    """Create the directory that weights travel through, and remove those of runs that were killed.

    It lies in `shared` if given, else in memory if the weights fit twice (a new file stands beside the old one until it
    is renamed), else in `fallback`. All sizes are in bytes.
    """
    parent = shared or fallback
    if shared is None and _SHARED_MEMORY.is_dir():
        for left in _SHARED_MEMORY.glob(f"{_PREFIX}*"):
            if not Path("/proc", left.name.removeprefix(_PREFIX).partition("-")[0]).exists():
                shutil.rmtree(left, ignore_errors=True)
        if shutil.disk_usage(_SHARED_MEMORY).free > 2 * weight_bytes:
            parent = _SHARED_MEMORY
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=parent))


class DiskWeightSync:
    """Export once, load on every engine; each engine must then say that it serves the new version."""

    def __init__(self, export: Callable[[str], object], endpoints: list[Endpoint], folder: Path) -> None:
        """`export(directory)` makes the trainer write a Hugging Face directory; `folder` is removed at the end."""
        self._export = export
        self._endpoints = endpoints
        self._folder = folder
        self._pool = ThreadPoolExecutor(max(len(endpoints), 1), thread_name_prefix="weight-sync")

    def push(self, weight_version: str) -> None:
        """Bring the trainer's current weights to every engine under `weight_version`; raises `ServiceError`."""
        self._export(str(self._folder))
        for done in [self._pool.submit(self._update, endpoint, weight_version) for endpoint in self._endpoints]:
            done.result()

    def _update(self, endpoint: Endpoint, weight_version: str) -> None:
        body = {"model_path": str(self._folder), "weight_version": weight_version}
        answer = ask(endpoint, "/update_weights_from_disk", body)
        if not answer.get("success"):
            raise ServiceError(f"engine {endpoint.url} refused /update_weights_from_disk: {answer}")
        served = ask(endpoint, "/model_info").get("weight_version")
        if served != weight_version:
            raise ServiceError(f"engine {endpoint.url} took weights {weight_version!r} but says it serves {served!r}")

    def served(self, weight_version: str) -> str:
        """Return the version by which engines call the weights pushed under `weight_version`: the same."""
        return weight_version

    def close(self) -> None:
        """Remove the directory."""
        self._pool.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def ask(endpoint: Endpoint, path: str, body: dict[str, str] | None = None) -> dict[str, Any]:
    """POST `body`, or GET without one, and return the decoded reply."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(endpoint.url + path, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
            return json.load(reply)
    except urllib.error.HTTPError as error:
        raise ServiceError(f"engine {endpoint.url} refused {path}: {error.code} {error.read()[:500]!r}") from error
    except OSError as error:
        raise ServiceError(f"engine {endpoint.url} did not answer {path}: {error}") from error
