"""Ray, and nothing but Ray: worker processes that host the plain services."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miles_api import stacks
from miles_api.loading.load import provider
from miles_train.driver.engine_hosts import EngineHost, Part, RayFleet
from miles_train.driver.layout import layout_of, lives_on_ray
from miles_train.driver.remote import Remote, Watch
from miles_train.driver.room import Room
from miles_train.driver.stuck import where_they_are
from miles_train.options import ClusterOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from miles_api.config import RunConfig
    from miles_api.errors import MilesError

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

    def gpus(self) -> tuple[int, ...]:
        """Return the numbers of the GPUs that Ray gave to this process."""
        return tuple(int(gpu) for gpu in ray.get_gpu_ids())

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

    def __init__(self, config: RunConfig, check: Callable[[], None], stacks_in: Path) -> None:
        """`check` is called in every wait and raises when the run was interrupted; processes that are late write their
        stacks into `stacks_in`. Raises `ServiceError` for a cluster without room for the run.
        """
        self._config = config
        self._options = config.group(ClusterOptions)
        self._layout = layout_of(config)
        self._stacks_in = stacks_in
        self._watch = Watch(check, stacks_in)
        self._actors: list[Any] = []
        self._ranks: Remote | None = None
        slots = self._layout.slots if lives_on_ray(config) else self._layout.ranks
        own: dict[str, Any] = {
            # Workers of a small machine share its cores: Ray only counts them, one a process.
            "num_cpus": max(slots + 1, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        address = self._options.ray_address
        # "local": without --ray-address the run never joins a cluster that happens to be there (RAY_ADDRESS).
        try:
            _init_ray(address=address or "local", logging_level=logging.ERROR, **({} if address else own))
            self._room = Room(self._layout, engines_too=lives_on_ray(config))
        except BaseException:
            ray.shutdown()
            raise

    @property
    def gpus(self) -> int:
        """How many GPUs the cluster has."""
        return self._room.gpus

    def rollout(self) -> Remote:
        """Start the one rollout process."""
        # Router and engines listen on this node's loopback address.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        deadline = ("--rollout-timeout", self._options.rollout_timeout)
        remote = self._start("rollout", {"rollout": {"num_cpus": 1, "scheduling_strategy": here}}, deadline)
        remote.build(self._config, [{}])
        return remote

    def trainers(self) -> Remote:
        """Start one process for each trainer rank, unless they are there; on GPUs where the cluster has them."""
        remote = self._rank_processes()
        host, port, listener = remote.listen()
        per_node = self._layout.trainer_slots
        remote.build(
            self._config,
            [
                {
                    "rank": rank,
                    "world_size": self._layout.ranks,
                    "master_addr": host,
                    "master_port": port,
                    "listen_fd": None if rank else listener,
                    "timeout": self._options.trainer_timeout + _AFTER_DEADLINE,
                    # Ray shows each process its own GPU as number 0.
                    "local_rank": 0 if self._room.gpus else rank % per_node,
                }
                for rank in range(self._layout.ranks)
            ],
        )
        return remote

    def engines(self) -> RayFleet:
        """Return a fleet whose engines live in processes of this cluster, in slots of their own or the trainer's."""
        shared = self._layout.shared and self._room.gpus
        gpus = self._rank_processes().gpus() if shared else []
        directory = str(self._stacks_in.resolve())

        def create(index: int) -> list[Part]:
            parts = []
            for seat in self._room.seats(index, gpus):
                # Threads: an engine can be asked, and stopped, while it starts.
                options: dict[str, Any] = {"max_restarts": 0, "max_concurrency": 4, **seat.resources}
                host: Any = ray.remote(**options)(EngineHost)
                parts.append(Part(host.remote(f"engine-host-{index}", directory), seat.gpu_ids))
            self._actors += [part.actor for part in parts]
            return parts

        return RayFleet(self._config, create, ray.util.get_node_ip_address(), self._stacks_in)

    def _rank_processes(self) -> Remote:
        """Start the trainer's processes in the order of their ranks, node by node; once."""
        if self._ranks is None:
            deadline = ("--trainer-timeout", self._options.trainer_timeout)
            where = {f"trainer {rank}": self._room.of_rank(rank) for rank in range(self._layout.ranks)}
            self._ranks = self._start("train", where, deadline)
        return self._ranks

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

    def _start(self, service: str, where: dict[str, dict[str, Any]], deadline: tuple[str, float]) -> Remote:
        """Start a process for each name, with what it takes and where."""
        directory = str(self._stacks_in.resolve())
        actors = {
            name: ray.remote(max_restarts=0, **options)(_Host).remote(name.replace(" ", "-"), directory)
            for name, options in where.items()
        }
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


def _init_ray(**options: Any) -> None:
    """Start Ray or join one, without leaving SIGTERM to it: Ray would abort the driver."""
    ours, terminated = signal.getsignal(signal.SIGTERM), False
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        # What workers print gets a prefix of Ray's, coloured also in files and pipes.
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")
    try:
        ray.init(**options)
    except SystemExit:
        # How Ray's handler ends the process; it was in place for a moment.
        terminated = True
    finally:
        signal.signal(signal.SIGTERM, ours)
    if terminated:
        signal.raise_signal(signal.SIGTERM)
