"""The checks of every hook, one file a stage, named as the stubs' own files in `miles_api.hooks`."""

from miles_api.testing.case import CASES
from miles_api.testing.cases import (
    agents,
    conversion,
    filtering,
    logging,
    megatron,
    model,
    reward,
    rollout,
    routing,
    training,
)

__all__ = [
    "CASES",
    "agents",
    "conversion",
    "filtering",
    "logging",
    "megatron",
    "model",
    "reward",
    "rollout",
    "routing",
    "training",
]
