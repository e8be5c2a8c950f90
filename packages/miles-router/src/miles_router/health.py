"""Who is asked how it is: quarantined workers until they serve again, busy ones that fall silent, and doubtful ones.

A quarantined worker is asked for `/health`, for which SGLang generates a token, and for its weights. One that is busy
may take long for that, and minutes for what it is busy with; `/server_info` its scheduler answers between two steps,
whatever the load, unless it hangs.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import msgspec

from .errors import ConnectError, HungError, LocalError, LostError, UpstreamError
from .fetch import fetch
from .model_info import MODEL_INFO_PATHS, model_info

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterable

    from .exchanges import Exchanges
    from .workers import Worker, WorkerRegistry

__all__ = ["HealthProber"]

_log = logging.getLogger("miles_router")

# an SGLang engine generates one token to answer /health, behind whatever it is busy with
_PROBE_TIMEOUT_S = 30.0
_WEIGHTS_TIMEOUT_S = 5.0
"""Shorter than whoever requires weights waits for the router to answer."""
_OK = 200
_NOT_FOUND = 404


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

    async def require_weights(self, registry: WorkerRegistry, version: str) -> None:
        """Let only workers get requests that show these weights from now on, whatever version that is; "" is any.

        Returns when every healthy worker has shown them or is quarantined, until it does.
        """
        registry.required = version
        await asyncio.gather(*(self._check_weights(registry, worker, version) for worker in registry.healthy))
        registry.changed()

    async def watch_silence(self, registry: WorkerRegistry, exchanges: Exchanges) -> None:
        """Ask workers that requests wait for, and that generated nothing for an interval, whether they hang, for ever.

        One that does is quarantined, if it is not yet, and its requests are abandoned.
        """
        loop = asyncio.get_running_loop()
        while self._hang_timeout:
            await asyncio.sleep(self._interval)
            for worker in exchanges.silent(loop.time() - self._interval):
                if not worker.questioned:
                    worker.questioned = True
                    self._spawn(self._ask_silent(registry, worker, exchanges))

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
            version = registry.weights_of(worker)
            try:
                problem = await probe(worker, version)
            except LocalError as exc:
                problem = str(exc)
            if worker.healthy or worker not in registry:
                return
            if version != registry.weights_of(worker):  # others are wanted meanwhile
                continue
            if not problem:
                worker.weight_version = version
                registry.readmit(worker)
                return
            worker.reason = problem
            wait = min(wait * 2, self._interval)

    async def _question(self, registry: WorkerRegistry, worker: Worker) -> None:
        try:
            problem = await probe(worker)
        except LocalError:
            return
        finally:
            worker.questioned = False
        if problem:
            registry.quarantine(worker, problem)

    async def _check_weights(self, registry: WorkerRegistry, worker: Worker, version: str) -> None:
        if not version:
            return
        try:
            async with asyncio.timeout(_WEIGHTS_TIMEOUT_S):
                problem = await _weight_problem(worker, version)
        except TimeoutError:
            problem = f"does not say within {_WEIGHTS_TIMEOUT_S:g} s which weights it serves"
        except UpstreamError as exc:
            problem = str(exc)
        if registry.required != version:  # others are wanted meanwhile
            return
        if problem:
            registry.quarantine(worker, problem)
        else:
            worker.weight_version = version

    async def _ask_silent(self, registry: WorkerRegistry, worker: Worker, exchanges: Exchanges) -> None:
        asked = asyncio.get_running_loop().time()
        try:
            error = await self._no_reaction(worker)
            if error is None or exchanges.heard(worker, asked):  # it went on with what it was busy with
                return
            # what keeps all of them from reacting is none's fault, and nobody would be the better for a second attempt
            if not await _any_reacts(w for w in registry.healthy if w is not worker):
                _log.warning("worker %s %s, and no other reacts: its requests wait", worker.url, error)
                return
        finally:
            worker.questioned = False
        refused = isinstance(error, ConnectError) and error.refused
        worker.hung = not refused
        registry.quarantine(worker, str(error))
        if not refused:  # else its process ends, or ended: what it still works on shows by itself what becomes of it
            exchanges.abandon(worker, HungError(f"hangs: it {error}"))

    async def _no_reaction(self, worker: Worker) -> UpstreamError | None:
        """Return what a worker does in place of reacting until the deadline; None if it reacts, or we cannot ask."""
        silence = HungError(f"does not answer /server_info within {self._hang_timeout:g} s")
        error: UpstreamError = silence
        try:
            async with asyncio.timeout(self._hang_timeout):
                while True:
                    try:
                        await fetch(worker, "/server_info")
                    except (ConnectError, LocalError) as exc:
                        error = exc
                    except LostError:
                        return None
                    else:  # any status will do
                        return None
                    await asyncio.sleep(self._interval)
                    error = silence
        except TimeoutError:
            return None if isinstance(error, LocalError) else error


async def _any_reacts(workers: Iterable[Worker]) -> bool:
    asked = [asyncio.ensure_future(_reacts(worker)) for worker in workers]
    try:
        for answer in asyncio.as_completed(asked):
            if await answer:
                return True
    finally:
        for question in asked:
            question.cancel()
    return False


async def _reacts(worker: Worker) -> bool:
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            await fetch(worker, "/server_info")
    except LostError:
        return True
    except (TimeoutError, UpstreamError):
        return False
    return True


async def probe(worker: Worker, version: str = "") -> str:
    """Ask a worker for its health, and whether it serves weights `version` unless any will do; return what is wrong.

    One that hung has to answer what showed that too. Raises `LocalError` if it cannot be asked.
    """
    try:
        async with asyncio.timeout(_PROBE_TIMEOUT_S):
            status, _ = await fetch(worker, "/health")
            if status != _OK:
                return f"answers /health with {status}"
            if worker.hung:
                await fetch(worker, "/server_info")
            return await _weight_problem(worker, version) if version else ""
    except TimeoutError:
        return f"does not answer a probe within {_PROBE_TIMEOUT_S:g} s"
    except LocalError:
        raise
    except UpstreamError as exc:
        return str(exc)


async def _weight_problem(worker: Worker, wanted: str) -> str:
    status, body = 0, b""
    for path in MODEL_INFO_PATHS:
        status, body = await fetch(worker, path)
        if status != _NOT_FOUND:
            break
    if status != _OK:
        return f"answers /model_info with {status}, so its weights cannot be checked"
    try:
        version = model_info(body).version
    except msgspec.DecodeError as exc:
        return f"has an unreadable /model_info: {exc}"
    return "" if version == wanted else f"serves weights {version or '(none)'}, not {wanted}"
