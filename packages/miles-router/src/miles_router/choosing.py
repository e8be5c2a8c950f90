"""The values of `--router-policy`, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .affinity import ConsistentHashing, Sticky
from .policies import LeastOutstanding, PowerOfTwo, Random, RoundRobin
from .prefix import PrefixAware

if TYPE_CHECKING:
    from collections.abc import Callable

    from .policies import Policy
    from .workers import WorkerRegistry

__all__ = ["looks_at_requests", "make_policy"]

_POLICIES: dict[str, Callable[[WorkerRegistry], Policy]] = {
    "least_outstanding": lambda _: LeastOutstanding(),
    "round_robin": lambda _: RoundRobin(),
    "random": lambda _: Random(),
    "power_of_two": lambda _: PowerOfTwo(),
    "consistent_hashing": ConsistentHashing,
    "sticky": Sticky,
    "prefix_aware": lambda _: PrefixAware(),
}
_BY_LOAD = frozenset(("least_outstanding", "round_robin", "random", "power_of_two"))


def looks_at_requests(name: str) -> bool:
    """Tell whether a policy decides by more than the load."""
    return name not in _BY_LOAD


def make_policy(name: str, registry: WorkerRegistry) -> Policy:
    """Return a fresh policy for the workers of `registry`; `name` is a value of `--router-policy`."""
    return _POLICIES[name](registry)
