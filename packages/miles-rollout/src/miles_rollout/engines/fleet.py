"""From `--rollout-engine` to a fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.run_options import RunOptions
from miles_rollout.engines.key import given_key
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.attached import AttachedFleet
from miles_rollout.engines.sglang.check import urls_of
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_api.services import EngineFleet

__all__ = ["create"]


def create(config: RunConfig) -> EngineFleet:
    """Build the fleet that `--rollout-engine` names; the entry point `miles.services: engines`."""
    run, fleet = config.group(RunOptions), config.group(EngineFleetOptions)
    model, patience = str(run.hf_checkpoint), fleet.engine_health_timeout
    if fleet.rollout_engine == "local":
        local = config.group(LocalEngineOptions)
        return LocalFleet(
            local, model, run.seed, addresses=fleet, deterministic=run.deterministic, health_timeout=patience
        )
    if urls := urls_of(config):
        return AttachedFleet(urls, model, health_timeout=patience, key=given_key(fleet))
    # Whose GPUs are whose is the driver's matter; without it there is one for each engine.
    cluster = config.flat()
    gives_way = cluster.get("offload_rollout")
    return SGLangFleet(
        config.group(SGLangOptions),
        fleet,
        model,
        run.seed,
        gpus_per_engine=cluster.get("rollout_num_gpus_per_engine", 1),
        memory_saver=cluster.get("colocate", False) if gives_way is None else gives_way,
        health_timeout=patience,
    )
