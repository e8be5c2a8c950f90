"""Who is asked how it is: quarantined workers until they serve again, busy ones that fall silent, and doubtful ones.

A quarantined worker is asked for `/health`, for which SGLang generates a token, and for its weights. One that is busy
may take long for that, and minutes for what it is busy with; `/server_info` it answers between two steps, whatever the
load, unless it hangs.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from .connection import ConnectError, HungError, LostError, UpstreamError
from .fetch import fetch

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from .workers import Worker, WorkerRegistry

__all__ = ["HealthProber"]

# an SGLang engine generates one token to answer /health, behind whatever it is busy with
_PROBE_TIMEOUT_S = 30.0
_OK = 200
_NOT_FOUND = 404


class _ModelInfo(msgspec.Struct):
    weight_version: str | int | None = None


class HealthProber:
    """The tasks that ask. `interval` and `hang_timeout` are `--router-health-interval` and `--router-hang-timeout`."""

    def __init__(self, interval: float, hang_timeout: float) -> None:
        self._interval = interval
        self._hang_timeout = hang_timeout
        self._tasks: set[asyncio.Task[None]] = set()

    def watch(self, registry: WorkerRegistry, worker: Worker) -> None:
        """Probe a quarantined `worker` until it is re-admitted or removed.

        Waits double from a tenth of the interval up to all of it, and begin higher for one that keeps coming back.
        """
        self._spawn(self._until_healthy(registry, worker))

    def question(self, registry: WorkerRegistry, worker: Worker) -> None:
        """Ask a healthy `worker` once whether it is; quarantine it if not."""
        if worker.healthy and not worker.questioned:
            worker.questioned = True
            self._spawn(self._question(registry, worker))

    async def watch_silence(
        self,
        registry: WorkerRegistry,
        waits_for: Callable[[Worker], bool],
        abandon: Callable[[Worker, UpstreamError], None],
    ) -> None:
        """Ask workers that requests wait for, and that have sent nothing for an interval, whether they hang, for ever.

        One that does is quarantined and `abandon` is called with it.
        """
        loop = asyncio.get_running_loop()
        while self._hang_timeout:
            await asyncio.sleep(self._interval)
            before = loop.time() - self._interval
            for worker in registry.healthy:
                silent = worker.outstanding and not worker.questioned and worker.pool.last_heard < before
                if silent and waits_for(worker):
                    worker.questioned = True
                    self._spawn(self._ask_silent(registry, worker, abandon))

    def first_wait(self, worker: Worker) -> float:
        """Return how many seconds after its quarantine a worker is probed first."""
        return min(self._interval / 10 * 2.0 ** min(worker.strikes - 1, 10), self._interval)

    async def close(self) -> None:
        """Stop all probes."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _until_healthy(self, registry: WorkerRegistry, worker: Worker) -> None:
        wait = self.first_wait(worker)
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

    async def _question(self, registry: WorkerRegistry, worker: Worker) -> None:
        try:
            problem = await probe(worker, weights=False)
        finally:
            worker.questioned = False
        if problem:
            registry.quarantine(worker, problem)

    async def _ask_silent(
        self, registry: WorkerRegistry, worker: Worker, abandon: Callable[[Worker, UpstreamError], None]
    ) -> None:
        # any status will do, and any end: it reacts
        asked = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(self._hang_timeout):
                await fetch(worker, "/server_info")
        except LostError:
            return
        except TimeoutError:
            problem = f"does not answer /server_info within {self._hang_timeout:g} s"
        except ConnectError as exc:
            problem = str(exc)
        else:
            return
        finally:
            worker.questioned = False
        if worker.pool.last_heard > asked:  # it went on with what it was busy with
            return
        registry.quarantine(worker, problem)
        abandon(worker, HungError(f"hangs: it {problem}"))


async def probe(worker: Worker, *, weights: bool = True) -> str:
    """Ask a worker for its health, and for its weights if it has to have certain ones; return what is wrong, or ""."""
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            status, _ = await fetch(worker, "/health")
            if status != _OK:
                return f"answers /health with {status}"
            return await _weight_problem(worker) if weights and worker.weight_version else ""
    except TimeoutError:
        return f"does not answer a probe within {_PROBE_TIMEOUT_S:g} s"
    except UpstreamError as exc:
        return str(exc)


async def _weight_problem(worker: Worker) -> str:
    status, body = await fetch(worker, "/model_info")
    if status == _NOT_FOUND:  # the name before SGLang 0.5.4
        status, body = await fetch(worker, "/get_model_info")
    if status != _OK:
        return f"answers /model_info with {status}, so its weights cannot be checked"
    try:
        version = msgspec.json.decode(body, type=_ModelInfo).weight_version
    except msgspec.DecodeError as exc:
        return f"has an unreadable /model_info: {exc}"
    if str(version) != worker.weight_version:
        return f"serves weights {version!s}, not {worker.weight_version}"
    return ""
