"""Ray's placement group of a run: which nodes trainer ranks and engines get."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from miles_train.driver.layout import Layout

__all__ = ["Room", "Seat"]

_PATIENCE = 60.0
"""Seconds in which a cluster that has the room gives it."""


class Seat(NamedTuple):
    """Where an engine's process on one node lives."""

    resources: dict[str, Any]
    """What Ray is asked for."""
    gpu_ids: tuple[int, ...] | None
    """GPUs that belong to trainer ranks; None where Ray gives the process its own."""


class Room:
    """The slots of a run in the cluster: one bundle for each node of the trainer, and for each node of each engine.

    A bundle lies on one node. Engines that share the trainer's GPUs are in the trainer's bundles.
    """

    def __init__(self, layout: Layout, *, engines_too: bool) -> None:
        """Wait until Ray has given the room; raises `ServiceError` for a cluster that is too small.

        Without `engines_too` engines live elsewhere.
        """
        resources = ray.cluster_resources()
        self.gpus = int(resources.get("GPU", 0))
        """How many GPUs the cluster has; without any, slots are CPUs."""
        self._layout = layout
        own_engines = layout.engines if engines_too and not layout.shared else 0
        self._nodes_an_engine = layout.nodes_of_engine(self._largest_node())
        self._first = layout.trainer_nodes
        bundles = [self._bundle(layout.trainer_slots, gpu=True)] * self._first
        part = layout.engine_slots // self._nodes_an_engine
        bundles += [self._bundle(part, gpu=layout.engines_use_gpus)] * (own_engines * self._nodes_an_engine)
        self._group = self._reserved(bundles) if bundles else None

    def of_rank(self, rank: int) -> dict[str, Any]:
        """Return what Ray is asked for the process of one trainer rank."""
        where = self._in(rank // self._layout.trainer_slots)
        return {"num_cpus": 1, "num_gpus": 1 if self.gpus else 0, **where}

    def seats(self, engine: int, gpus_of_ranks: list[tuple[int, ...]]) -> list[Seat]:
        """Return where the processes of one engine live, in the order of its nodes.

        `gpus_of_ranks` are those of the trainer ranks, for engines that share them; empty otherwise.
        """
        layout, nodes = self._layout, self._nodes_an_engine
        part = layout.engine_slots // nodes
        if not layout.shared:
            gpus = part if self.gpus and layout.engines_use_gpus else 0
            first = self._first + engine * nodes
            return [Seat({"num_cpus": 1, "num_gpus": gpus, **self._in(first + i)}, None) for i in range(nodes)]
        seats = []
        for i in range(nodes):
            first_rank = engine * layout.engine_slots + i * part
            given = tuple(gpu for gpus in gpus_of_ranks[first_rank : first_rank + part] for gpu in gpus)
            # The ranks hold the bundle's resources; engines use them in turns.
            where = self._in(first_rank // layout.trainer_slots)
            seats.append(Seat({"num_cpus": 0, "num_gpus": 0, **where}, given if layout.engines_use_gpus else ()))
        return seats

    def _largest_node(self) -> int:
        """Return how many slots an engine can have on one node."""
        layout = self._layout
        if layout.shared:
            return min(layout.engine_slots, layout.trainer_slots)
        if not (self.gpus and layout.engines_use_gpus):
            return layout.engine_slots
        return int(max(node["Resources"].get("GPU", 0) for node in ray.nodes() if node["Alive"]))

    def _bundle(self, slots: int, *, gpu: bool) -> dict[str, float]:
        bundle: dict[str, float] = {"CPU": slots}
        if gpu and self.gpus:
            bundle["GPU"] = slots
        return bundle

    def _reserved(self, bundles: list[dict[str, float]]) -> Any:
        self._require(bundles)
        group = placement_group(bundles, strategy="PACK")
        if not group.wait(_PATIENCE):
            raise ServiceError(
                f"the Ray cluster has the {self._needs(bundles)} that the run needs, but did not give them within "
                f"{_PATIENCE:g} s: other jobs hold them, or they do not lie on nodes as asked for ("
                f"{len(bundles)} nodes or parts of nodes: {bundles}); free are {ray.available_resources()}"
            )
        return group

    def _require(self, bundles: list[dict[str, float]]) -> None:
        """Refuse a cluster that can never hold the bundles, and the rollout process beside them."""
        have = ray.cluster_resources()
        need = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
        need["CPU"] += 1
        if any(have.get(kind, 0) < count for kind, count in need.items()):
            layout = self._layout
            raise ServiceError(
                f"the Ray cluster has {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs; the run needs "
                f"{self._needs(bundles)} and one CPU for the rollout process: {layout.ranks} trainer ranks"
                + (f", {layout.engines} engines of {layout.engine_slots}" if len(bundles) > self._first else "")
                + (", which share their slots" if layout.shared else "")
            )

    @staticmethod
    def _needs(bundles: list[dict[str, float]]) -> str:
        counts = {kind: sum(bundle.get(kind, 0) for bundle in bundles) for kind in ("CPU", "GPU")}
        return " and ".join(f"{count:g} {kind}s" for kind, count in counts.items() if count)

    def _in(self, bundle: int) -> dict[str, Any]:
        assert self._group is not None
        strategy = PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=bundle)
        return {"scheduling_strategy": strategy}
