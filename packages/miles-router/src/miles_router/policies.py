"""Which engine gets the next request, where only load decides.

Policies that look at the request are in `affinity` (a key in a header) and `prefix` (the prompt).
"""

from __future__ import annotations

import random
from operator import attrgetter
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .workers import Worker

__all__ = ["LeastOutstanding", "Policy", "PowerOfTwo", "Random", "RoundRobin", "RouteRequest"]

_outstanding = attrgetter("outstanding")


class RouteRequest:
    """What a policy may know of a request: bytes as they came, nothing decoded."""

    __slots__ = ("body", "headers")

    def __init__(self, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
        self.headers = headers
        """Names in lower case."""
        self.body = body

    def header(self, name: bytes) -> bytes | None:
        """Return the first header of that name (lower case), or None."""
        for given, value in self.headers:
            if given == name:
                return value
        return None


class Policy(Protocol):
    """Pick one of at least one healthy worker."""

    def choose(self, workers: Sequence[Worker], request: RouteRequest, /) -> Worker: ...


class RoundRobin:
    """Take the workers in turn."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, workers: Sequence[Worker], _request: RouteRequest, /) -> Worker:
        """Return the next worker in order of registration."""
        self._turn = (self._turn + 1) % len(workers)
        return workers[self._turn]


class LeastOutstanding:
    """Take the worker with the fewest requests under way; equals take turns."""

    def __init__(self) -> None:
        self._turn = -1

    def choose(self, workers: Sequence[Worker], _request: RouteRequest, /) -> Worker:
        """Return the least loaded worker."""
        if len(workers) == 1:
            return workers[0]
        turn = self._turn = (self._turn + 1) % len(workers)
        return min((*workers[turn:], *workers[:turn]), key=_outstanding)


class Random:
    """Take any worker."""

    def __init__(self) -> None:
        self._random = random.Random()

    def choose(self, workers: Sequence[Worker], _request: RouteRequest, /) -> Worker:
        """Return one worker, all equally likely."""
        return workers[int(self._random.random() * len(workers))]


class PowerOfTwo:
    """Take the less loaded of two workers drawn at random (Mitzenmacher 2001): nearly as even as asking all of them."""

    def __init__(self) -> None:
        self._random = random.Random()

    def choose(self, workers: Sequence[Worker], _request: RouteRequest, /) -> Worker:
        """Return the less loaded of two different workers."""
        count = len(workers)
        if count == 1:
            return workers[0]
        first = int(self._random.random() * count)
        second = int(self._random.random() * (count - 1))
        one, other = workers[first], workers[second + (second >= first)]
        return one if one.outstanding <= other.outstanding else other
