"""Engines where their GPUs are: one Ray worker process for each engine, and for each of its nodes if it has several."""

from __future__ import annotations

import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import ray
from ray.exceptions import RayActorError, RayError

from miles_api import stacks
from miles_api.addresses import is_loopback
from miles_api.errors import ServiceError
from miles_api.loading.load import provider
from miles_api.services import Endpoint, Placement
from miles_train.driver.remote import told

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from miles_api.config import RunConfig

__all__ = ["EngineHost", "Part", "RayFleet"]

_SLICE = 0.2
"""Seconds between two looks at whether the run stops, while an engine starts."""
_STOP_WITHIN = 20.0
"""Longer than SGLang takes to end when it is told to."""
_HOST, _KEY_VARIABLE = "engine_host", "engine_key_variable"
"""Options of the package that starts engines; another one may do without them."""


class EngineHost:
    """One engine, or its part on one node, and the fleet of the installed package that starts it. Plain Python."""

    def __init__(self, name: str, directory: str) -> None:
        stacks.register(name, directory)

    def where(self) -> tuple[str, tuple[int, ...], int]:
        """Return the address of this node, the numbers of the GPUs given to this process, and a free port."""
        host = ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            return host, tuple(int(gpu) for gpu in ray.get_gpu_ids()), listener.getsockname()[1]

    def start(self, config: RunConfig, placement: Placement, environment: dict[str, str]) -> Endpoint | None:
        """Start it; returns its address, None for a part that has none.

        `environment` holds the variables of the driver that the options name.
        """
        os.environ.update(environment)
        self._fleet = provider("miles.services", "engines")(config)
        self._fleet.start([placement])
        return self.endpoint()

    def endpoint(self) -> Endpoint | None:
        return next(iter(self._fleet.endpoints()), None)

    def restart(self) -> Endpoint:
        return self._fleet.restart(0)

    def dead(self) -> str:
        return self._fleet.dead().get(0, "")

    def pause(self) -> None:
        self._fleet.pause()

    def resume(self) -> None:
        self._fleet.resume()

    def stop(self) -> None:
        self._fleet.stop()


class Part(NamedTuple):
    """An engine's process on one node."""

    actor: Any
    """Ray's handle of an `EngineHost`."""
    gpu_ids: tuple[int, ...] | None
    """Its GPUs, where they are a trainer's; None for those that Ray gave to the process."""


class RayFleet:
    """An `EngineFleet` over Ray: it starts, asks and replaces the processes that host engines on their nodes."""

    def __init__(self, config: RunConfig, create: Callable[[int], list[Part]], here: str, stacks_in: Path) -> None:
        """`create(index)` starts the processes of an engine, in the order of its nodes; `here` is the driver's node."""
        self._config, self._create, self._here, self._stacks_in = config, create, here, stacks_in
        self._engines: list[list[Part]] = []
        self._endpoints: list[Endpoint] = []
        self._asked: dict[tuple[int, int], Any] = {}
        self._stopped = threading.Event()
        # held while processes are added: `stop`, which may come from another thread, finds all or prevents it
        self._lock = threading.Lock()

    def start(self, placements: list[Placement]) -> None:
        """Start as many engines as there are placements, each where `create` puts it; raises `ServiceError`."""
        with self._lock:
            self._refuse_if_stopped()
            self._engines = [self._create(index) for index in range(len(placements))]
        with ThreadPoolExecutor(max(len(placements), 1), thread_name_prefix="start-engine") as pool:
            self._endpoints = list(pool.map(self._start_engine, range(len(placements))))

    def endpoints(self) -> list[Endpoint]:
        """Return every engine's address with the weight version it reports; a dead engine reports none."""
        found = []
        for index, last in enumerate(self._endpoints):
            try:
                found.append(self._ask(index, "endpoint") or last)
            except ServiceError:
                found.append(msgspec.structs.replace(last, weight_version=""))
        return found

    def pause(self) -> None:
        """Pause every engine."""
        for index in range(len(self._engines)):
            self._ask(index, "pause")

    def resume(self) -> None:
        """Let every engine go on."""
        for index in range(len(self._engines)):
            self._ask(index, "resume")

    def dead(self) -> dict[int, str]:
        """Return the engines of which a part, or the process or node that hosts it, has died; never waits."""
        with self._lock:
            places = {(i, j): part for i, engine in enumerate(self._engines) for j, part in enumerate(engine)}
            for place in places.keys() - self._asked.keys():
                self._asked[place] = places[place].actor.dead.remote()
            asked = dict(self._asked)
            answered, _ = ray.wait(list(asked.values()), num_returns=len(asked), timeout=0) if asked else ([], [])
            found: dict[int, str] = {}
            for place in [place for place, ref in asked.items() if ref in answered]:
                if text := self._answer(place, self._asked.pop(place)):
                    found[place[0]] = text
        return found

    def restart(self, index: int) -> Endpoint:
        """Replace a dead engine: in its process if that lives, else in a new one, wherever Ray finds the room for it.

        Raises:
            ServiceError: it does not start, or `stop` was called before or meanwhile.
        """
        endpoint = self._restart_in_place(index)
        if endpoint is None:
            with self._lock:
                self._refuse_if_stopped()
                for part in self._engines[index]:
                    ray.kill(part.actor)
                self._engines[index] = self._create(index)
                self._forget(index)
            endpoint = self._start_engine(index)
        self._endpoints[index] = endpoint
        with self._lock:
            self._forget(index)
        return endpoint

    def stop(self) -> None:
        """End every engine and its process, for good; may be called twice, or when Ray is gone."""
        self._stopped.set()
        with self._lock:
            engines, self._engines = self._engines, []
            self._asked.clear()
        actors = [part.actor for engine in engines for part in engine]
        if not (actors and ray.is_initialized()):
            return
        ray.wait([actor.stop.remote() for actor in actors], num_returns=len(actors), timeout=_STOP_WITHIN)
        for actor in actors:
            ray.kill(actor)

    def _restart_in_place(self, index: int) -> Endpoint | None:
        """Return the new address; None for an engine of several parts, or whose process is gone."""
        with self._lock:
            self._refuse_if_stopped()
            parts = self._engines[index]
        if len(parts) > 1:
            return None
        try:
            return self._get(parts[0].actor.restart.remote(), index, "restart")
        except ServiceError as error:
            if isinstance(error.__cause__, RayActorError):
                return None
            raise

    def _start_engine(self, index: int) -> Endpoint:
        """Place the parts of an engine and start them together; return the address of the first."""
        parts = self._engines[index]
        places = [self._get(part.actor.where.remote(), index, "start") for part in parts]
        environment = self._environment()
        host, _, port = places[0]
        shown = f"[{host}]" if ":" in host else host
        refs = [
            part.actor.start.remote(
                self._config_on(node),
                Placement(
                    node=node,
                    gpu_ids=given if part.gpu_ids is None else part.gpu_ids,
                    node_rank=rank,
                    num_nodes=len(parts),
                    dist_init_addr=f"{shown}:{port}" if len(parts) > 1 else "",
                ),
                environment,
            )
            for rank, (part, (node, given, _)) in enumerate(zip(parts, places, strict=True))
        ]
        endpoint, *_ = [self._get(ref, index, "start") for ref in refs]
        return endpoint

    def _config_on(self, node: str) -> RunConfig:
        """Return the options of an engine on `node`: others than its own reach it at that address, not at loopback.

        The driver is on one node; trainer ranks, which send weights, may be on any.
        """
        nodes = {each["NodeManagerAddress"] for each in ray.nodes() if each["Alive"]}
        alone = nodes | {node} == {self._here}
        if alone or not is_loopback(self._config.flat().get(_HOST, "")):
            return self._config
        return self._config.replace(**{_HOST: node})

    def _environment(self) -> dict[str, str]:
        """Return the variable with the key of the engines, which other nodes do not have."""
        variable = self._config.flat().get(_KEY_VARIABLE)
        return {variable: os.environ[variable]} if variable and variable in os.environ else {}

    def _ask(self, index: int, method: str) -> Any:
        return self._get(getattr(self._engines[index][0].actor, method).remote(), index, method)

    def _get(self, ref: Any, index: int, doing: str) -> Any:
        """Wait for a result, or until the run stops; raises what the engine's fleet raised, else `ServiceError`."""
        while not ray.wait([ref], timeout=_SLICE)[0]:
            self._refuse_if_stopped()
        try:
            return ray.get(ref)
        except RayError as error:
            raise told(f"engine host {index}", f"engines.{doing}", error, self._stacks_in) from error

    def _answer(self, place: tuple[int, int], ref: Any) -> str:
        try:
            return ray.get(ref)
        except RayError as error:
            return str(told(f"engine host {place[0]}", "its watch", error, self._stacks_in))

    def _forget(self, index: int) -> None:
        """Drop questions that were asked of an engine that is gone."""
        self._asked = {place: ref for place, ref in self._asked.items() if place[0] != index}

    def _refuse_if_stopped(self) -> None:
        if self._stopped.is_set():
            raise ServiceError("the engines were stopped")
