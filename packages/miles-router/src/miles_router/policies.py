"""Which engine gets the next request."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .workers import Worker

__all__ = ["LeastOutstanding", "Policy", "RoundRobin", "make_policy"]

_outstanding = attrgetter("outstanding")


class Policy(Protocol):
    """Pick one of at least one healthy worker."""

    def choose(self, workers: Sequence[Worker]) -> Worker: ...


class RoundRobin:
    """Take the workers in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, workers: Sequence[Worker]) -> Worker:
        """Return the next worker in order of registration."""
        self._turn = (self._turn + 1) % len(workers)
        return workers[self._turn]


class LeastOutstanding:
    """Take the worker with the fewest requests under way; equals take turns."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, workers: Sequence[Worker]) -> Worker:
        """Return the least loaded worker."""
        if len(workers) == 1:
            return workers[0]
        turn = self._turn = (self._turn + 1) % len(workers)
        return min((*workers[turn:], *workers[:turn]), key=_outstanding)


_POLICIES = {"least_outstanding": LeastOutstanding, "round_robin": RoundRobin}


def make_policy(name: str) -> Policy:
    """Return a fresh policy; `name` is a value of `--router-policy`."""
    return _POLICIES[name]()
