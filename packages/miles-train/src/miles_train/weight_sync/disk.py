"""Weights through a directory: the trainer writes safetensors, every engine reads them.

In a run of one machine the directory lies in memory (/dev/shm) where there is such a place; on a cluster it is below
the run directory, which all nodes must see.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.services import Endpoint

__all__ = ["DiskWeightSync"]

_TIMEOUT = 600.0
_SHARED_MEMORY = Path("/dev/shm")


class DiskWeightSync:
    """Export once, load on every engine; each engine must answer with success before the next rollout."""

    def __init__(self, export: Callable[[str], None], endpoints: list[Endpoint], shared_dir: Path | None) -> None:
        """`export(directory)` makes the trainer write a Hugging Face directory; `shared_dir` is None on one machine."""
        self._export = export
        self._endpoints = endpoints
        memory = _SHARED_MEMORY if shared_dir is None and _SHARED_MEMORY.is_dir() else None
        self._folder = Path(tempfile.mkdtemp(prefix="miles-weights-", dir=shared_dir or memory))
        self._pool = ThreadPoolExecutor(max(len(endpoints), 1), thread_name_prefix="weight-sync")

    def push(self, weight_version: str) -> None:
        """Bring the trainer's current weights to every engine under `weight_version`; raises `ServiceError`."""
        self._export(str(self._folder))
        body = {"model_path": str(self._folder), "weight_version": weight_version}
        for result in [self._pool.submit(_post, end, "/update_weights_from_disk", body) for end in self._endpoints]:
            result.result()

    def close(self) -> None:
        """Remove the directory."""
        self._pool.shutdown(wait=False)
        shutil.rmtree(self._folder, ignore_errors=True)


def _post(endpoint: Endpoint, path: str, body: dict[str, str]) -> None:
    request = urllib.request.Request(
        endpoint.url + path, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
            answer = json.load(reply)
    except urllib.error.HTTPError as error:
        raise ServiceError(f"engine {endpoint.url} refused {path}: {error.code} {error.read()[:500]!r}") from error
    except OSError as error:
        raise ServiceError(f"engine {endpoint.url} did not answer {path}: {error}") from error
    if not answer.get("success"):
        raise ServiceError(f"engine {endpoint.url} refused {path}: {answer}")
