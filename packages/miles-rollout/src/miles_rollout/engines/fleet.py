"""From `--rollout-engine` to a fleet."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.run_options import RunOptions
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.options import LocalEngineOptions

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_api.services import EngineFleet

__all__ = ["create"]


def create(config: RunConfig) -> EngineFleet:
    """Build the fleet that `--rollout-engine` names; the entry point `miles.services: engines`."""
    run = config.group(RunOptions)
    options = config.group(LocalEngineOptions)
    return LocalFleet(options, str(run.hf_checkpoint), run.seed, deterministic=run.deterministic)
