"""Ray, and nothing but Ray: worker processes that host the plain services."""

from __future__ import annotations

import logging
import os
import signal
import socket
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miles_api import stacks
from miles_api.errors import MilesError, ServiceError
from miles_api.loading.load import provider
from miles_train.driver.remote import Remote, Watch
from miles_train.driver.stuck import where_they_are
from miles_train.options import ClusterOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from miles_api.config import RunConfig

__all__ = ["Cluster", "Remote"]

_OBJECT_STORE_BYTES = 256 * 1024 * 1024
_OTHER_NODES = 10.0
"""Seconds that other nodes get to collect stacks."""
_AFTER_DEADLINE = 60.0
"""Seconds by which the driver's deadline comes before that of a collective, which could not say who is missing."""


class _Host:
    """One worker process: builds a service from its entry point and forwards calls to it."""

    def __init__(self, name: str, directory: str) -> None:
        stacks.register(name, directory)

    def listen(self) -> tuple[str, int, int]:
        """Listen at this node's address; return it with a port that is taken from now on, and the descriptor."""
        host = ray.util.get_node_ip_address()
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        return host, listener.getsockname()[1], listener.detach()

    def build(self, service: str, config: RunConfig, keywords: dict[str, Any]) -> None:
        self._service = provider("miles.services", service)(config, **keywords)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._service, method)(*args)

    def call_split(self, method: str, key: str, *args: Any) -> tuple[Any, Any]:
        """Call, and return one entry of the resulting dict as an object of its own."""
        result = getattr(self._service, method)(*args)
        return result.pop(key), result

    def ping(self) -> None: ...


class Cluster:
    """A running Ray cluster, or one of our own on this machine."""

    def __init__(self, config: RunConfig, check: Callable[[], None], stacks_in: Path, *, trains: bool = True) -> None:
        """`trains` is false for a run without trainer ranks.

        `check` is called in every wait and raises when the run was interrupted; processes that are late write their
        stacks into `stacks_in`.
        """
        self._config = config
        self._parallel = config.group(ParallelOptions)
        self._options = config.group(ClusterOptions)
        self._stacks_in = stacks_in
        self._watch = Watch(check, stacks_in)
        self._actors: list[Any] = []
        world = self._parallel.world_size if trains else 0
        own: dict[str, Any] = {
            # Workers of a small machine share its cores: Ray only counts them, one a process.
            "num_cpus": max(world + 1, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        address = self._options.ray_address
        # "local": without --ray-address the run never joins a cluster that happens to be there (RAY_ADDRESS).
        try:
            _init_ray(address=address or "local", logging_level=logging.ERROR, **({} if address else own))
            self._gpus = _gpus_for(world)
        except BaseException:
            ray.shutdown()
            raise

    def rollout(self) -> Remote:
        """Start the one rollout process."""
        # Router and engines listen on this node's loopback address.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        deadline = ("--rollout-timeout", self._options.rollout_timeout)
        remote = self._start("rollout", ["rollout"], deadline, scheduling_strategy=here)
        remote.build(self._config, [{}])
        return remote

    def trainers(self) -> Remote:
        """Start one process for each trainer rank; on GPUs where the cluster has them."""
        ranks = range(self._parallel.world_size)
        deadline = ("--trainer-timeout", self._options.trainer_timeout)
        names = [f"trainer {rank}" for rank in ranks]
        remote = self._start("train", names, deadline, num_gpus=1 if self._gpus else 0)
        host, port, listener = remote.listen()
        remote.build(
            self._config,
            [
                {
                    "rank": rank,
                    "world_size": self._parallel.world_size,
                    "master_addr": host,
                    "master_port": port,
                    "listen_fd": None if rank else listener,
                    "timeout": self._options.trainer_timeout + _AFTER_DEADLINE,
                    # Ray shows each process its own GPU as number 0.
                    "local_rank": 0 if self._gpus else rank % self._parallel.actor_num_gpus_per_node,
                }
                for rank in ranks
            ],
        )
        return remote

    def heed(self, problem: Callable[[], MilesError | None], during: Collection[str] | None = None) -> None:
        """Ask `problem` during every call from now on, or those of the methods `during`, and raise what it returns."""
        self._watch.heed(problem, during)

    def check(self) -> None:
        """Raise if the run has to end."""
        self._watch.look()

    def stop(self) -> None:
        """End all worker processes, whatever they do, and Ray itself if it is ours."""
        try:
            for actor in self._actors:
                ray.kill(actor)
        finally:
            ray.shutdown()

    def _start(self, service: str, names: list[str], deadline: tuple[str, float], **where: Any) -> Remote:
        host = ray.remote(num_cpus=1, max_restarts=0, **where)(_Host)
        directory = str(self._stacks_in.resolve())
        actors = {name: host.remote(name.replace(" ", "-"), directory) for name in names}
        self._actors += actors.values()
        return Remote(service, actors, self._watch, deadline=deadline, stacks=self._where_they_are)

    def _where_they_are(self, late: list[str]) -> str:
        """Collect the stacks of every process of the run, and say where those that are late hang."""
        collect = ray.remote(num_cpus=0, max_retries=0)(stacks.collect)
        here = ray.get_runtime_context().get_node_id()
        others = [
            collect.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False))
            for node in ray.nodes()
            if node["Alive"] and node["NodeID"] != here
        ]
        asked = [one.remote(self._stacks_in.resolve()) for one in others]
        found = stacks.collect(self._stacks_in)
        done, _ = ray.wait(asked, num_returns=len(asked), timeout=_OTHER_NODES) if asked else ([], [])
        for answer in done:
            # A node that fails here must not hide what the others say.
            with suppress(RayError):
                found |= ray.get(answer)
        return where_they_are(found, late, self._stacks_in)


def _gpus_for(world: int) -> int:
    """Return how many GPUs the cluster has; raises `ServiceError` if it is too small for `world` trainer ranks."""
    resources = ray.cluster_resources()
    gpus = int(resources.get("GPU", 0))
    if resources.get("CPU", 0) < world + 1 or 0 < gpus < world:
        raise ServiceError(
            f"the Ray cluster has {resources.get('CPU', 0):g} CPUs and {gpus} GPUs; {world} trainer ranks "
            "and the rollout process need one CPU each, and one GPU a rank where there are GPUs"
        )
    return gpus


def _init_ray(**options: Any) -> None:
    """Start Ray or join one, without leaving SIGTERM to it: Ray would abort the driver."""
    ours, terminated = signal.getsignal(signal.SIGTERM), False
    try:
        ray.init(**options)
    except SystemExit:
        # How Ray's handler ends the process; it was in place for a moment.
        terminated = True
    finally:
        signal.signal(signal.SIGTERM, ours)
    if terminated:
        signal.raise_signal(signal.SIGTERM)
