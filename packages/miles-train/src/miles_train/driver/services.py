"""Start and stop everything a run needs, in parallel where nothing depends on the order."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.checks.run_checks import services_of
from miles_api.errors import MilesError
from miles_api.loading.load import provider
from miles_api.run_options import RunOptions
from miles_api.services import Endpoint, EngineFleet, Placement, RouterService
from miles_train.driver.cluster import Cluster, Remote
from miles_train.options import ClusterOptions
from miles_train.weight_sync.disk import DiskWeightSync, make_folder
from miles_train.weight_sync.fixed import FixedWeights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.config import RunConfig

__all__ = ["Services", "running"]


class Services(msgspec.Struct, kw_only=True):
    """The running parts of a run."""

    rollout: Remote
    trainers: Remote | None
    """None with `--debug-rollout-only`."""
    router: RouterService | None
    """None where no engine runs."""
    sync: DiskWeightSync | FixedWeights | None
    """None where no engine runs."""
    seconds: dict[str, float]
    """Seconds each part took to start."""

    def hook_reports(self, patience: float | None = None) -> dict[str, list[dict[str, Any]]]:
        """Ask every process which hooks it has and how they fared; by the name of the process.

        With `patience`, each is given so many seconds, and one that does not answer is left out: for a run that fails.
        """
        reports: dict[str, list[dict[str, Any]]] = {}
        give_up = (MilesError,) if patience else ()
        with suppress(*give_up):
            reports["rollout"] = self.rollout.call("report", timeout=patience)[0]
        with suppress(*give_up):
            ranks = self.trainers.call("report", timeout=patience) if self.trainers else []
            reports |= {f"trainer {rank}": hooks for rank, hooks in enumerate(ranks)}
        with suppress(*give_up):
            reports |= {"router": self.router.report()} if self.router else {}
        return reports


class _Clock:
    def __init__(self, say: Callable[[str], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._say = say

    def timed(self, name: str, call: Callable[[], Any]) -> Any:
        self._say(f"starting {name}")
        started = time.perf_counter()
        result = call()
        self.seconds[name] = time.perf_counter() - started
        return result


@contextmanager
def running(config: RunConfig, say: Callable[[str], None]) -> Iterator[Services]:
    """Start router, engines, Ray, the rollout process and the trainer ranks; stop them all on the way out.

    What this run does not need is not started. Engines load while Ray starts, and the trainer loads while the rollout
    process does; the first failure of any of them ends the start.
    """
    wanted = services_of(config.group(RunOptions))
    clock = _Clock(say)
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(3, thread_name_prefix="start")
        stack.callback(pool.shutdown)
        router, serving = _start_serving(config, clock, pool, stack) if "engines" in wanted else (None, None)
        cluster = clock.timed("ray", lambda: Cluster(config, trains="train" in wanted))
        stack.callback(cluster.stop)
        trainers = clock.timed("trainer processes", cluster.trainers) if "train" in wanted else None
        loading = [pool.submit(clock.timed, "trainer", lambda: trainers.call("start"))] if trainers else []
        rollout = clock.timed("rollout process", cluster.rollout)
        _first_failure([*loading, *([serving] if serving else [])])
        url, endpoints = serving.result() if serving else ("", [])
        clock.timed("rollout", lambda: rollout.call("start", url))
        sync = _weight_sync(config, trainers, endpoints) if endpoints else None
        if sync:
            stack.callback(sync.close)
        yield Services(rollout=rollout, trainers=trainers, router=router, sync=sync, seconds=clock.seconds)
        # Only after success: a process that failed or hangs would not answer, and ends with the cluster.
        rollout.call("stop")
        if trainers:
            trainers.call("stop")


def _start_serving(
    config: RunConfig, clock: _Clock, pool: ThreadPoolExecutor, stack: ExitStack
) -> tuple[RouterService, Future[tuple[str, list[Endpoint]]]]:
    fleet: EngineFleet = provider("miles.services", "engines")(config)
    router: RouterService = provider("miles.services", "router")(config)
    serving = pool.submit(_serve, clock, config, fleet, router)

    def stop() -> None:
        # Stopping makes a start that still goes on fail, and only when it has ended is nothing started any more.
        for _ in range(2):
            fleet.stop()
            router.stop()
            wait([serving])

    stack.callback(stop)
    return router, serving


def _first_failure(futures: list[Future[Any]]) -> None:
    """Wait for all, or raise the first exception as soon as there is one."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


def _weight_sync(
    config: RunConfig, trainers: Remote | None, endpoints: list[Endpoint]
) -> DiskWeightSync | FixedWeights:
    if trainers is None:
        return FixedWeights(endpoints)
    run = config.group(RunOptions)
    shared = Path(run.run_dir) if config.group(ClusterOptions).ray_address else None
    size = sum(file.stat().st_size for file in Path(str(run.hf_checkpoint)).glob("*.safetensors"))
    folder = make_folder(size, shared, fallback=Path(run.run_dir))
    return DiskWeightSync(lambda target: trainers.call("export", target, True), endpoints, folder)


def _serve(clock: _Clock, config: RunConfig, fleet: EngineFleet, router: RouterService) -> tuple[str, list[Endpoint]]:
    """Start router and engines and introduce them to each other; return the router's URL and the engines."""
    url = clock.timed("router", router.start)
    count = config.flat()["rollout_num_engines"]
    clock.timed("engines", lambda: fleet.start([Placement() for _ in range(count)]))
    endpoints = fleet.endpoints()
    for endpoint in endpoints:
        router.register(endpoint)
    return url, endpoints
