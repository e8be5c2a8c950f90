"""The values of `--router-policy`, by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .affinity import ConsistentHashing, Sticky
from .policies import LeastOutstanding, PowerOfTwo, Random, RoundRobin
from .prefix import PrefixAware

if TYPE_CHECKING:
    from collections.abc import Callable

    from .policies import Policy

__all__ = ["make_policy"]

_POLICIES: dict[str, Callable[[], Policy]] = {
    "least_outstanding": LeastOutstanding,
    "round_robin": RoundRobin,
    "random": Random,
    "power_of_two": PowerOfTwo,
    "consistent_hashing": ConsistentHashing,
    "sticky": Sticky,
    "prefix_aware": PrefixAware,
}


def make_policy(name: str) -> Policy:
    """Return a fresh policy; `name` is a value of `--router-policy`."""
    return _POLICIES[name]()
