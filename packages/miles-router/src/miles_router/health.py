"""Quarantine ends here: unhealthy workers are probed until they serve again, with the weights they should have."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from .connection import UpstreamConnection, UpstreamError

if TYPE_CHECKING:
    from .workers import Worker, WorkerRegistry

__all__ = ["HealthProber"]

# an SGLang engine generates one token to answer /health, behind whatever it is busy with
_PROBE_TIMEOUT_S = 30.0
_OK = 200
_NOT_FOUND = 404


class _ModelInfo(msgspec.Struct):
    weight_version: str | int | None = None


class HealthProber:
    """One task for each quarantined worker; waits double from a tenth of `interval` seconds up to all of it."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, registry: WorkerRegistry, worker: Worker) -> None:
        """Probe `worker` until it is re-admitted or removed."""
        task = asyncio.get_running_loop().create_task(self._until_healthy(registry, worker))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stop all probes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _until_healthy(self, registry: WorkerRegistry, worker: Worker) -> None:
        wait = self._interval / 10
        while True:
            await asyncio.sleep(wait)
            if worker.healthy or worker not in registry:
                return
            problem = await probe(worker)
            if worker.healthy or worker not in registry:
                return
            if not problem:
                registry.readmit(worker)
                return
            worker.reason = problem
            wait = min(wait * 2, self._interval)


async def probe(worker: Worker) -> str:
    """Ask a worker for its health and weights; return what is wrong, or an empty string."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            status, _ = await _get(worker, "/health")
            if status != _OK:
                return f"answers /health with {status}"
            return await _weight_problem(worker) if worker.weight_version else ""
    except TimeoutError:
        return f"does not answer a probe within {_PROBE_TIMEOUT_S:g} s"
    except UpstreamError as exc:
        return str(exc)


async def _weight_problem(worker: Worker) -> str:
    status, body = await _get(worker, "/model_info")
    if status == _NOT_FOUND:  # the name before SGLang 0.5.4
        status, body = await _get(worker, "/get_model_info")
    if status != _OK:
        return f"answers /model_info with {status}, so its weights cannot be checked"
    try:
        version = msgspec.json.decode(body, type=_ModelInfo).weight_version
    except msgspec.DecodeError as exc:
        return f"has an unreadable /model_info: {exc}"
    if str(version) != worker.weight_version:
        return f"serves weights {version!s}, not {worker.weight_version}"
    return ""


async def _get(worker: Worker, path: str) -> tuple[int, bytes]:
    connection: UpstreamConnection = await worker.pool.connect()
    try:
        head = b"GET %s HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % (path.encode(), worker.host)
        connection.begin(head, b"", head_only=False)
        await connection.wait_answer()
        parts, more = [], True
        while more:
            await connection.wait_more()
            data, more = connection.take()
            parts.append(data)
        return connection.status, b"".join(parts)
    finally:
        connection.finish()
