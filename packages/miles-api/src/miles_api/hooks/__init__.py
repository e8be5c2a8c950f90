"""Every hook of Miles, declared once. The stubs are the contract: flags, checks and docs derive from them."""

from miles_api.hooks import agents, conversion, filtering, logging, megatron, model, reward, rollout, routing, training
from miles_api.spec import REGISTRY

__all__ = [
    "REGISTRY",
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
