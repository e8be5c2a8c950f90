"""How many GPUs a run needs, and who has them: arithmetic that is checked before anything starts.

A slot is a GPU or, where there is none, the share of a CPU machine that one process takes.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.checks.run_checks import services_of
from miles_api.config import DERIVED
from miles_api.run_options import RunOptions
from miles_train.options import ClusterOptions, ParallelOptions, WeightSyncOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["Layout", "derived_engines", "layout_notes", "layout_of", "layout_problems", "lives_on_ray"]

_ENGINES = "rollout_num_engines"
_LOCAL = "local"
_ATTACHED = "rollout_engine_urls"


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """The slots of a run."""

    trainer_nodes: int = 0
    """Nodes of the trainer; 0 in a run without."""
    trainer_slots: int = 0
    """Trainer ranks on each of them."""
    engines: int = 0
    """Inference engines that take slots; 0 in a run without, or whose engines run already."""
    engine_slots: int = 1
    """Slots of each engine."""
    shared: bool = False
    """Whether engines live in the trainer's slots."""
    engines_use_gpus: bool = False

    @property
    def ranks(self) -> int:
        """How many trainer ranks there are."""
        return self.trainer_nodes * self.trainer_slots

    @property
    def slots(self) -> int:
        """How many slots trainer and engines need together."""
        own = self.engines * self.engine_slots
        return max(self.ranks, own) if self.shared else self.ranks + own

    def nodes_of_engine(self, slots_of_node: int) -> int:
        """Return over how many nodes each engine is spread, where a node has so many slots for engines."""
        return max(1, -(-self.engine_slots // slots_of_node))


def layout_of(config: RunConfig) -> Layout:
    """Return the layout of a checked run: what it starts, and where."""
    parallel, cluster = config.group(ParallelOptions), config.group(ClusterOptions)
    wanted = services_of(config.group(RunOptions))
    trains, serves = "train" in wanted, "engines" in wanted
    return Layout(
        trainer_nodes=parallel.actor_num_nodes if trains else 0,
        trainer_slots=parallel.actor_num_gpus_per_node if trains else 0,
        engines=config.flat()[_ENGINES] if serves and not _attached(config) else 0,
        engine_slots=cluster.rollout_num_gpus_per_engine,
        shared=cluster.colocate and trains and serves,
        engines_use_gpus=serves and config.flat()["rollout_engine"] != _LOCAL and not _attached(config),
    )


def _attached(config: RunConfig) -> bool:
    """Say whether the engines run already, somewhere, and take no slot."""
    return bool(config.flat().get(_ATTACHED))


def derived_engines(config: RunConfig) -> dict[str, int]:
    """Return how many engines follow from their GPUs, or their GPUs from how many engines there are."""
    options = config.flat()
    if _ENGINES not in options:
        return {}
    cluster, each = config.group(ClusterOptions), options["rollout_num_gpus_per_engine"]
    given = {name: config.sources.get(name, DERIVED) != DERIVED for name in (_ENGINES, "rollout_num_gpus")}
    if given["rollout_num_gpus"]:
        gpus = cluster.rollout_num_gpus or 0
        return {} if given[_ENGINES] or gpus % each else {_ENGINES: gpus // each}
    if given[_ENGINES] or not cluster.colocate:
        return {"rollout_num_gpus": options[_ENGINES] * each}
    engines = max(1, config.group(ParallelOptions).world_size // each)
    return {_ENGINES: engines, "rollout_num_gpus": engines * each}


def layout_problems(config: RunConfig) -> Iterator[str]:
    """Yield what does not add up: GPUs of trainer and engines, and who may do what at the same time."""
    yield from _schedule_problems(config)
    options = config.flat()
    if _ENGINES not in options or "engines" not in services_of(config.group(RunOptions)):
        return
    cluster, engines = config.group(ClusterOptions), options[_ENGINES]
    each, gpus = cluster.rollout_num_gpus_per_engine, cluster.rollout_num_gpus
    if each > 1 and options["rollout_engine"] == _LOCAL:
        yield f"--rollout-num-gpus-per-engine {each}: the local engine takes one slot; leave it out"
    elif gpus != engines * each and config.sources.get("rollout_num_gpus", DERIVED) != DERIVED:
        yield (
            f"--rollout-num-gpus {gpus} is not --rollout-num-engines {engines} × --rollout-num-gpus-per-engine {each} "
            f"= {engines * each}: give one of the first two, as a multiple of the third"
        )
    elif cluster.colocate:
        yield from _shared_problems(layout_of(config))


def _shared_problems(layout: Layout) -> Iterator[str]:
    """Check that engines fit into the trainer's nodes without one lying across the border of two in part."""
    if not layout.shared:
        return
    each, node = layout.engine_slots, layout.trainer_slots
    if layout.engines * each > layout.ranks:
        yield (
            f"--colocate: {layout.engines} engines of {each} GPUs need {layout.engines * each}, and the trainer has "
            f"{layout.ranks} (--actor-num-nodes × --actor-num-gpus-per-node): lower --rollout-num-engines"
        )
    elif (node % each if each <= node else each % node) and layout.trainer_nodes > 1:
        yield (
            f"--colocate: engines of {each} GPUs (--rollout-num-gpus-per-engine) do not fit nodes of {node} "
            "(--actor-num-gpus-per-node): one has to be a multiple of the other"
        )


def _schedule_problems(config: RunConfig) -> Iterator[str]:
    run, cluster = config.group(RunOptions), config.group(ClusterOptions)
    if cluster.rollout_schedule == "sync":
        return
    flag = f"--rollout-schedule {cluster.rollout_schedule}"
    if run.deterministic:
        yield f"{flag} with --deterministic: which weights make a rollout would depend on a kill and --resume; drop one"
    if cluster.colocate:
        yield f"{flag} with --colocate: engines generate while the trainer trains, so each needs its own GPUs; drop one"
    elif cluster.trainer_gives_way or cluster.engines_give_way:
        yield (
            f"{flag} with --offload-train or --offload-rollout: neither trainer nor engines ever pause, so none can "
            "give up its memory; drop one"
        )
    if cluster.rollout_schedule == "in-flight" and config.group(WeightSyncOptions).pause_generation_mode == "abort":
        yield (
            f"{flag} with --pause-generation-mode abort: each push would end responses of the rollout that is being "
            "made; take retract or in_place"
        )


def layout_notes(config: RunConfig) -> Iterator[str]:
    """Yield what the schedule changes of what is computed."""
    schedule = config.group(ClusterOptions).rollout_schedule
    if schedule != "sync":
        much = "up to one version" if schedule == "in-flight" else "one version"
        yield (
            f"rollout_schedule: rollouts are made by weights {much} older than those that train on them; --use-tis "
            "corrects for it, and rollout/staleness reports it"
        )


def lives_on_ray(config: RunConfig) -> bool:
    """Say whether Ray starts the engines of a run: on a cluster, and where they use GPUs.

    Engines on the CPU of this machine are children of the driver: they load while Ray starts, which takes seconds off
    every start, and there is no other place where they could be. Servers that run already nobody starts.
    """
    if _attached(config):
        return False
    gpus = any(Path("/dev").glob("nvidia[0-9]*"))
    return config.group(ClusterOptions).ray_address is not None or (gpus and layout_of(config).engines_use_gpus)
