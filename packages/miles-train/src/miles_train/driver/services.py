"""Start and stop everything a run needs, in parallel where nothing depends on the order."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.load import provider
from miles_api.run_options import RunOptions
from miles_api.services import Endpoint, EngineFleet, Placement, RouterService
from miles_train.driver.cluster import Cluster, Remote
from miles_train.options import ClusterOptions
from miles_train.weight_sync.disk import DiskWeightSync, make_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.config import RunConfig

__all__ = ["Services", "running"]


class Services:
    """The running parts of a run. `sync` is None when no engine runs."""

    def __init__(self, rollout: Remote, trainers: Remote, sync: DiskWeightSync | None, seconds: dict[str, float]):
        self.rollout = rollout
        self.trainers = trainers
        self.sync = sync
        self.seconds = seconds
        """Seconds each part took to start."""


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

    Engines load while Ray starts, and the trainer loads while the rollout process does; the first failure of any of
    them ends the start.
    """
    run = config.group(RunOptions)
    clock = _Clock(say)
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(3, thread_name_prefix="start")
        stack.callback(pool.shutdown)
        serving = _start_serving(config, clock, pool, stack) if run.loss_type != "sft_loss" else None
        cluster = clock.timed("ray", lambda: Cluster(config))
        stack.callback(cluster.stop)
        trainers = clock.timed("trainer processes", cluster.trainers)
        loading = pool.submit(clock.timed, "trainer", lambda: trainers.call("start"))
        rollout = clock.timed("rollout process", cluster.rollout)
        _first_failure([loading, *([serving] if serving else [])])
        url, endpoints = serving.result() if serving else ("", [])
        clock.timed("rollout", lambda: rollout.call("start", url))
        sync = _weight_sync(config, trainers, endpoints) if endpoints else None
        if sync:
            stack.callback(sync.close)
        yield Services(rollout, trainers, sync, clock.seconds)
        # Only after success: a process that failed or hangs would not answer, and ends with the cluster.
        rollout.call("stop")
        trainers.call("stop")


def _start_serving(
    config: RunConfig, clock: _Clock, pool: ThreadPoolExecutor, stack: ExitStack
) -> Future[tuple[str, list[Endpoint]]]:
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
    return serving


def _first_failure(futures: list[Future[Any]]) -> None:
    """Wait for all, or raise the first exception as soon as there is one."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


def _weight_sync(config: RunConfig, trainers: Remote, endpoints: list[Endpoint]) -> DiskWeightSync:
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
