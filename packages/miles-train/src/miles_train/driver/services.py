"""Start and stop everything a run needs, in parallel where nothing depends on the order."""

from __future__ import annotations

import time
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.checks.run_checks import services_of
from miles_api.errors import MilesError, ServiceError
from miles_api.loading.load import provider
from miles_api.run_options import RunOptions
from miles_api.services import Endpoint, EngineFleet, Placement, RouterService
from miles_train.driver.cluster import Cluster, Remote
from miles_train.driver.layout import lives_on_ray
from miles_train.driver.rollouts import Rollouts
from miles_train.driver.supervisor import Supervisor
from miles_train.driver.turns import ALL_TAGS, EngineMemory, Turns
from miles_train.driver.weights import weight_sync
from miles_train.options import ClusterOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator

    from miles_api.config import RunConfig
    from miles_train.weight_sync.fixed import FixedWeights
    from miles_train.weight_sync.frame import WeightSync

__all__ = ["Services", "running"]

_PARTS = 3
"""What starts at the same time: engines, trainer ranks, the rollout process."""
_NEED_ENGINES = ("generate", "evaluate")
"""Calls that end when engines are lost for good; a push ends by itself, and what is trained can still be saved."""
_LOOK = 0.2
"""Seconds between two looks at whether a start has to end."""


class Services(NamedTuple):
    """The running parts of a run."""

    rollout: Remote
    rollouts: Rollouts
    """What `rollout` makes, on the schedule of the run."""
    turns: Turns
    trainers: Remote | None
    """None with `--debug-rollout-only`."""
    supervisor: Supervisor | None
    """None where no engine runs."""
    sync: WeightSync | FixedWeights | None
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
            reports |= {"router": self.supervisor.router_report()} if self.supervisor else {}
        return reports

    def restarts(self) -> dict[str, float]:
        """Count what was replaced since the last call, as metrics; empty where nothing was."""
        return self.supervisor.restarts() if self.supervisor else {}


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


class _Serving(NamedTuple):
    """Engines and router, and what they are once they have started."""

    fleet: EngineFleet
    router: RouterService
    started: Future[tuple[str, list[Endpoint]]]


@contextmanager
def running(
    config: RunConfig, say: Callable[[str], None], note: Callable[[str], None], check: Callable[[], None]
) -> Iterator[Services]:
    """Start router, engines, Ray, the rollout process and the trainer ranks; stop them all on the way out.

    What this run does not need is not started. Engines load while Ray starts, the trainer ranks while the rollout
    process does; the first failure of any of them ends the start, and so does what `check` raises, which is asked
    again and again. `say` gets each phase of the start, `note` a line for each thing worth keeping: an engine or the
    router that died and is replaced.
    """
    wanted, options = services_of(config.group(RunOptions)), config.group(ClusterOptions)
    clock, memory = _Clock(say), EngineMemory()
    in_turns = options.engines_give_way and "engines" in wanted and "train" in wanted
    serve = partial(_start_serving, config, clock, release=memory.release if in_turns else None)
    with ExitStack() as stack:
        pool = ThreadPoolExecutor(_PARTS, thread_name_prefix="start")
        stack.callback(pool.shutdown)
        serving = None
        if "engines" in wanted and not lives_on_ray(config):
            serving = serve(provider("miles.services", "engines")(config), pool, stack)
        stacks, starting = Path(config.group(RunOptions).run_dir, "stacks"), []
        cluster = clock.timed("ray", lambda: Cluster(config, check, stacks))
        stack.callback(_stop_cluster, cluster, starting)
        if "engines" in wanted and serving is None:
            # Their processes belong to Ray, and end before it does.
            serving = serve(cluster.engines(), pool, stack)
        first = serving.started if serving and in_turns else None
        training = [pool.submit(_start_trainers, clock, cluster, first)] if "train" in wanted else []
        sampling = pool.submit(_start_rollout, clock, cluster, serving)
        starting += [*training, sampling]
        _first_failure([*starting, *([serving.started] if serving else [])], check)
        trainers, rollout = training[0].result() if training else None, sampling.result()
        endpoints = serving.started.result()[1] if serving else []
        sync = weight_sync(config, trainers, endpoints, gpus=cluster.gpus > 0) if endpoints else None
        if sync:
            stack.callback(sync.close)
        supervisor = _supervise(config, serving, sync, cluster, note, stack) if serving and sync else None
        rollouts = _rollouts(config, rollout)
        stack.callback(rollouts.close)
        give_way = {"trainer_gives_way": options.trainer_gives_way, "engines_give_way": options.engines_give_way}
        yield Services(
            rollout=rollout,
            rollouts=rollouts,
            turns=Turns(trainers, supervisor, memory, **give_way),
            trainers=trainers,
            supervisor=supervisor,
            sync=sync,
            seconds=clock.seconds,
        )
        # Only after success: a process that failed or hangs would not answer, and ends with the cluster.
        rollout.call("stop")
        if trainers:
            trainers.call("stop")


def _start_serving(
    config: RunConfig,
    clock: _Clock,
    fleet: EngineFleet,
    pool: ThreadPoolExecutor,
    stack: ExitStack,
    *,
    release: Callable[..., None] | None,
) -> _Serving:
    """Start engines and router; with `release` engines give up all their memory as soon as they have started."""
    router: RouterService = provider("miles.services", "router")(config)
    started = pool.submit(_serve, clock, config, fleet, router, release)

    def stop() -> None:
        # Stopping makes a start that still goes on fail, and only when it has ended is nothing started any more.
        for _ in range(2):
            fleet.stop()
            router.stop()
            wait([started])

    stack.callback(stop)
    return _Serving(fleet, router, started)


def _supervise(
    config: RunConfig,
    serving: _Serving,
    sync: WeightSync | FixedWeights,
    cluster: Cluster,
    note: Callable[[str], None],
    stack: ExitStack,
) -> Supervisor:
    supervisor = Supervisor(
        serving.fleet,
        serving.router,
        serving.started.result()[1],
        sync,
        max_restarts=config.group(ClusterOptions).engine_max_restarts,
        note=note,
    )
    supervisor.start()
    stack.callback(supervisor.stop)
    cluster.heed(supervisor.problem, _NEED_ENGINES)
    # What it asks of the trainer would go on for as long as the trainer is busy.
    stack.callback(cluster.heed, _stops)
    return supervisor


def _rollouts(config: RunConfig, rollout: Remote) -> Rollouts:
    run, schedule = config.group(RunOptions), config.group(ClusterOptions).rollout_schedule
    # In the run directory: the rollout process writes there, on this node.
    aside = Path(run.run_dir, "rollout-ahead").resolve()
    ahead, in_flight = schedule != "sync", schedule == "in-flight"
    return Rollouts(rollout, run.num_rollout, ahead=ahead, aside=aside, in_flight=in_flight)


def _start_trainers(clock: _Clock, cluster: Cluster, first: Future[Any] | None) -> Remote:
    """Start the trainer ranks; their models are loaded when `first` is done, which leaves them its memory."""
    trainers = clock.timed("trainer processes", cluster.trainers)
    if first:
        _first_failure([first], cluster.check)
    clock.timed("trainer", lambda: trainers.call("start"))
    return trainers


def _start_rollout(clock: _Clock, cluster: Cluster, serving: _Serving | None) -> Remote:
    rollout = clock.timed("rollout process", cluster.rollout)
    if serving:
        _first_failure([serving.started], cluster.check)
    url = serving.started.result()[0] if serving else ""
    clock.timed("rollout", lambda: rollout.call("start", url))
    return rollout


def _stop_cluster(cluster: Cluster, starting: list[Future[Any]]) -> None:
    """Stop Ray when nobody uses it any more: what still starts there is told to end first."""
    cluster.heed(_stops)
    wait(starting)
    cluster.stop()


def _stops() -> MilesError:
    return ServiceError("the run stops")


def _first_failure(futures: list[Future[Any]], check: Callable[[], None]) -> None:
    """Wait for all, or raise the first exception as soon as there is one, also what `check` raises."""
    left: Collection[Future[Any]] = futures
    while left:
        check()
        done, left = wait(left, timeout=_LOOK, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()


def _serve(
    clock: _Clock, config: RunConfig, fleet: EngineFleet, router: RouterService, release: Callable[..., None] | None
) -> tuple[str, list[Endpoint]]:
    """Start router and engines and introduce them to each other; return the router's URL and the engines."""
    url = clock.timed("router", router.start)
    count = config.flat()["rollout_num_engines"]
    clock.timed("engines", lambda: fleet.start([Placement() for _ in range(count)]))
    endpoints = fleet.endpoints()
    for endpoint in endpoints:
        router.register(endpoint)
    if release:
        release(endpoints, *ALL_TAGS)
    return url, endpoints
