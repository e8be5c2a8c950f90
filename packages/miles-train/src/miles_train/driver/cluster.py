"""Ray, and nothing but Ray: worker processes that host the plain services."""

from __future__ import annotations

import logging
import os
import signal
import socket
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from miles_api.errors import MilesError, ServiceError
from miles_api.loading.load import provider
from miles_train.options import ClusterOptions, ParallelOptions

if TYPE_CHECKING:
    from miles_api.config import RunConfig

__all__ = ["Cluster", "Remote"]

_OBJECT_STORE_BYTES = 256 * 1024 * 1024


class _Host:
    """One worker process: builds a service from its entry point and forwards calls to it."""

    def address(self) -> tuple[str, int]:
        """Return this node's address and a port that was free a moment ago."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def build(self, service: str, config: RunConfig, keywords: dict[str, Any]) -> None:
        self._service = provider("miles.services", service)(config, **keywords)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._service, method)(*args)

    def call_split(self, method: str, key: str, *args: Any) -> tuple[Any, Any]:
        """Call, and return one entry of the resulting dict as an object of its own."""
        result = getattr(self._service, method)(*args)
        return result.pop(key), result


class Remote:
    """One service in one or more worker processes: the ranks of the trainer, or the rollout process."""

    def __init__(self, service: str, config: RunConfig, actors: list[Any]) -> None:
        self._service = service
        self._config = config
        self._timeout = config.group(ClusterOptions).trainer_timeout
        self._actors = actors

    def address(self) -> tuple[str, int]:
        """Return the first process's node address and a free port there."""
        return self._get("address", self._actors[0].address.remote())

    def build(self, keywords: list[dict[str, Any]]) -> None:
        """Create the service in every process, each with its own keywords."""
        pairs = zip(self._actors, keywords, strict=True)
        self._get("build", [actor.build.remote(self._service, self._config, mine) for actor, mine in pairs])

    def call(self, method: str, *args: Any, timeout: float | None = None) -> list[Any]:
        """Call a method on every process and wait for all results, in rank order; `timeout` (s) replaces the usual."""
        return self._get(method, [actor.call.remote(method, *args) for actor in self._actors], timeout)

    def call_split(self, method: str, key: str, *args: Any) -> tuple[Any, dict[str, Any]]:
        """Call on the one process; return a reference to `result[key]`, left where it is, and the rest."""
        part, rest = self._actors[0].call_split.options(num_returns=2).remote(method, key, *args)
        return part, self._get(method, rest)

    def _get(self, method: str, refs: Any, timeout: float | None = None) -> Any:
        """Wait for results within the deadline; our errors come through as they are, others with a traceback."""
        name = f"{self._service}.{method}"
        try:
            return ray.get(refs, timeout=timeout or self._timeout)
        except GetTimeoutError as error:
            deadline = f"{timeout:g} s" if timeout else f"--trainer-timeout {self._timeout:g} s"
            raise ServiceError(f"{name} did not return within {deadline}") from error
        except RayTaskError as error:
            if isinstance(error.cause, MilesError):
                again = type(error.cause)(*error.cause.args)
                for note in getattr(error.cause, "__notes__", []):
                    again.add_note(note)
                raise again from error
            raise ServiceError(f"{name} failed\n{error}") from error
        except RayActorError as error:
            raise ServiceError(f"the {self._service} process died during {method}: {error}") from error


class Cluster:
    """A running Ray cluster, or one of our own on this machine."""

    def __init__(self, config: RunConfig, *, trains: bool = True) -> None:
        """`trains` is false for a run without trainer ranks."""
        self._config = config
        self._parallel = config.group(ParallelOptions)
        world = self._parallel.world_size if trains else 0
        address = config.group(ClusterOptions).ray_address
        own: dict[str, Any] = {
            # Workers of a small machine share its cores: Ray only counts them, one a process.
            "num_cpus": max(world + 1, os.cpu_count() or 1),
            "object_store_memory": _OBJECT_STORE_BYTES,
            "include_dashboard": False,
        }
        terminate = signal.getsignal(signal.SIGTERM)
        # "local": without --ray-address the run never joins a cluster that happens to be there (RAY_ADDRESS).
        ray.init(address=address or "local", logging_level=logging.ERROR, **({} if address else own))
        # Ray takes SIGTERM for itself and aborts; a terminated run must still stop its engines and write its report.
        signal.signal(signal.SIGTERM, terminate)
        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        if resources.get("CPU", 0) < world + 1 or 0 < self._gpus < world:
            ray.shutdown()
            raise ServiceError(
                f"the Ray cluster has {resources.get('CPU', 0):g} CPUs and {self._gpus} GPUs; {world} trainer ranks "
                "and the rollout process need one CPU each, and one GPU a rank where there are GPUs"
            )

    def rollout(self) -> Remote:
        """Start the one rollout process."""
        # Router and engines listen on this node's loopback address.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        remote = self._start("rollout", 1, scheduling_strategy=here)
        remote.build([{}])
        return remote

    def trainers(self) -> Remote:
        """Start one process for each trainer rank; on GPUs where the cluster has them."""
        parallel = self._parallel
        remote = self._start("train", parallel.world_size, num_gpus=1 if self._gpus else 0)
        host, port = remote.address()
        remote.build(
            [
                {
                    "rank": rank,
                    "world_size": parallel.world_size,
                    "master_addr": host,
                    "master_port": port,
                    # Ray shows each process its own GPU as number 0.
                    "local_rank": 0 if self._gpus else rank % parallel.actor_num_gpus_per_node,
                }
                for rank in range(parallel.world_size)
            ]
        )
        return remote

    def _start(self, service: str, count: int, **where: Any) -> Remote:
        host = ray.remote(num_cpus=1, max_restarts=0, **where)(_Host)
        return Remote(service, self._config, [host.remote() for _ in range(count)])

    def stop(self) -> None:
        """End all worker processes, and Ray itself if it is ours."""
        ray.shutdown()
