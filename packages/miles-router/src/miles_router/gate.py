"""Limits on the requests under way, and the queue of those that wait: first come, first served, up to a deadline.

Nothing here exists where no limit is set.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import time
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from .messages import until_gone
from .routing import Refusal

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .messages import Receive
    from .options import RouterOptions
    from .policies import Policy
    from .routing import Route
    from .workers import Worker, WorkerRegistry

__all__ = ["Gate", "make_gate"]

_UNLIMITED = 1 << 60
_LONGEST_ADVICE_S = 60
_REMEMBERED = 1000


class _Waiting(NamedTuple):
    number: int
    route: Route


_Line = OrderedDict[asyncio.Future, _Waiting]


class Gate:
    """Hand out workers below their limit; whoever finds none waits, and is served in the order of arrival.

    Where the first in the queue may only go to workers that are full, the next one who may go elsewhere passes it.
    Those who may go to the same workers stand in one line, of which only the first is looked at: a place that becomes
    free costs as much as there are lines, however many wait.
    """

    def __init__(
        self, registry: WorkerRegistry, policy: Policy, *, total: int, each: int, size: int, timeout: float
    ) -> None:
        """Let `total` requests through at once and `each` to one worker, 0 without limit; `size` wait `timeout` s."""
        self._registry = registry
        self._policy = policy
        self._total, self._each = total or _UNLIMITED, each or _UNLIMITED
        self._size, self._timeout = size, timeout
        self._active = 0
        self._numbers = itertools.count(1)
        self._lines: dict[Hashable, _Line] = {}
        self._waiting = 0
        self._pace = _Pace()

    def __len__(self) -> int:
        return self._waiting

    def check(self) -> None:
        """Raise `Refusal` where a request that arrives now would have to wait and cannot."""
        if self._waiting and self._waiting >= self._size and self._is_full():
            raise self._full()

    async def enter(self, route: Route, receive: Receive) -> Worker | None:
        """Return the worker for a request, which counts as under way from now on; None if the client left.

        One that comes back because its worker failed waits in front. Raises `Refusal` if there is no candidate, the
        queue is full, or the time is up.
        """
        # overtakes nobody: a worker that one of those who wait could have would not be free
        worker = self._free(route)
        if worker is not None:
            return worker
        if self._waiting >= self._size and not route.failed:
            raise self._full()
        return await self._wait(route, receive)

    def leave(self) -> None:
        """Count a request as over and serve the queue."""
        self._active -= 1
        if self._waiting:
            self._pace.step()
            self._serve()

    def pump(self) -> None:
        """Refuse those for whom nobody is left and serve the queue; called when a worker comes, goes or changes."""
        for line in list(self._lines.values()):
            if not self._first(line).route.candidates(self._registry):
                for turn, waiting in list(line.items()):
                    turn.set_exception(waiting.route.refusal(self._registry))
                    self._remove(turn, waiting.route)
        self._serve()

    def _serve(self) -> None:
        while self._active < self._total and (line := self._next_line()) is not None:
            turn, waiting = next(iter(line.items()))
            turn.set_result(self._grant(self._below_limit(waiting.route.candidates(self._registry)), waiting.route))
            self._remove(turn, waiting.route)

    def _next_line(self) -> _Line | None:
        """Return the line whose first came first, of those for whose first a worker is free."""
        candidates = ((line, self._first(line).route.candidates(self._registry)) for line in self._lines.values())
        served = (line for line, workers in candidates if self._below_limit(workers))
        return min(served, key=lambda line: self._first(line).number, default=None)

    @staticmethod
    def _first(line: _Line) -> _Waiting:
        return next(iter(line.values()))

    def _below_limit(self, workers: list[Worker]) -> list[Worker]:
        return [worker for worker in workers if worker.outstanding < self._each]

    def _is_full(self) -> bool:
        healthy = self._registry.healthy
        return bool(healthy) and (
            self._active >= self._total or all(worker.outstanding >= self._each for worker in healthy)
        )

    def _free(self, route: Route) -> Worker | None:
        """Return a worker below its limit, counted as under way; None if all are full. Raises `Refusal`."""
        workers = route.candidates(self._registry)
        if not workers:
            raise route.refusal(self._registry)
        free = self._below_limit(workers) if self._active < self._total else []
        return self._grant(free, route) if free else None

    def _grant(self, free: list[Worker], route: Route) -> Worker:
        worker = self._policy.choose(free, route.request)
        worker.outstanding += 1
        self._active += 1
        return worker

    async def _wait(self, route: Route, receive: Receive) -> Worker | None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Worker] = loop.create_future()
        self._add(turn, route)
        gone = loop.create_task(until_gone(receive))
        try:
            await asyncio.wait((turn, gone), timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if turn.done() and not turn.exception():
                self._give_up(turn.result())
            raise
        finally:
            gone.cancel()
            self._remove(turn, route)
        if turn.done():
            return turn.result()
        if gone.done():
            return None
        text = f"no worker became free within --router-queue-timeout {self._timeout:g} s"
        raise Refusal(503, "queue_timeout", text, retry_after=self._advice())

    def _add(self, turn: asyncio.Future[Worker], route: Route) -> None:
        line = self._lines.setdefault(route.claim, OrderedDict())
        number = next(self._numbers)
        line[turn] = _Waiting(number - _UNLIMITED if route.failed else number, route)
        if not self._waiting:
            self._pace.begin()
        self._waiting += 1

    def _remove(self, turn: asyncio.Future[Worker], route: Route) -> None:
        line = self._lines.get(route.claim)
        if line is None or line.pop(turn, None) is None:
            return
        self._waiting -= 1
        if not line:
            del self._lines[route.claim]

    def _give_up(self, worker: Worker) -> None:
        worker.outstanding -= 1
        self.leave()

    def _full(self) -> Refusal:
        text = f"{self._waiting} requests wait already (--router-queue-size)"
        return Refusal(503, "queue_full", text, retry_after=self._advice())

    def _advice(self) -> int:
        """Return the seconds in which those who wait now will have been served, if it goes on as it did."""
        return min(max(math.ceil(self._waiting * self._pace.seconds()), 1), _LONGEST_ADVICE_S)


class _Pace:
    """How long it takes from one request's end to the next, since there is a queue."""

    def __init__(self) -> None:
        self._since = 0.0
        self._served = 0

    def begin(self) -> None:
        """Measure from now on: the queue was empty."""
        self._since, self._served = time.monotonic(), 0

    def step(self) -> None:
        """Count one that ended now."""
        self._served += 1
        if self._served == _REMEMBERED:  # what is long ago weighs less
            self._since, self._served = (self._since + time.monotonic()) / 2, _REMEMBERED // 2

    def seconds(self) -> float:
        """Return the mean of these seconds."""
        return (time.monotonic() - self._since) / max(self._served, 1)


def make_gate(options: RouterOptions, registry: WorkerRegistry, policy: Policy) -> Gate | None:
    """Return the gate that the options ask for; None without a limit."""
    each, total = options.router_max_worker_requests, options.router_max_requests
    if not (each or total):
        return None
    size, timeout = options.router_queue_size, options.router_queue_timeout
    return Gate(registry, policy, total=total, each=each, size=size, timeout=timeout)
