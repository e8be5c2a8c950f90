"""Limits on the requests under way, and the queue of those that wait: first come, first served, up to a deadline.

Nothing here exists where no limit is set.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

from .messages import until_gone
from .routing import Refusal

if TYPE_CHECKING:
    from .messages import Receive
    from .options import RouterOptions
    from .policies import Policy
    from .routing import Route
    from .workers import Worker, WorkerRegistry

__all__ = ["Gate", "make_gate"]

_UNLIMITED = 1 << 60


class Gate:
    """Hand out workers below their limit; whoever finds none waits, and is served in the order of arrival.

    Where the first in the queue may only go to workers that are full, the next one who may go elsewhere passes it.
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
        self._waiting: OrderedDict[asyncio.Future[Worker], Route] = OrderedDict()

    def __len__(self) -> int:
        return len(self._waiting)

    def check(self) -> None:
        """Raise `Refusal` where a request that arrives now would have to wait and cannot."""
        if self._waiting and len(self._waiting) >= self._size and self._is_full():
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
        if len(self._waiting) >= self._size and not route.failed:
            raise self._full()
        return await self._wait(route, receive)

    def leave(self) -> None:
        """Count a request as over and serve the queue: whoever is refused meanwhile leaves its turn to the next."""
        self._active -= 1
        self.pump()

    def pump(self) -> None:
        """Serve the queue as far as it goes; called when a worker comes or goes."""
        while self._serve_one():
            pass

    def _serve_one(self) -> bool:
        if not self._waiting or self._is_full():
            return False
        for future, route in self._waiting.items():
            try:
                worker = self._free(route)
            except Refusal as refusal:
                future.set_exception(refusal)
            else:
                if worker is None:
                    continue
                future.set_result(worker)
            del self._waiting[future]
            return True
        return False

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
        if self._active >= self._total:
            return None
        free = [worker for worker in workers if worker.outstanding < self._each]
        if not free:
            return None
        worker = self._policy.choose(free, route.request)
        worker.outstanding += 1
        self._active += 1
        return worker

    async def _wait(self, route: Route, receive: Receive) -> Worker | None:
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[Worker] = loop.create_future()
        self._waiting[turn] = route
        if route.failed:
            self._waiting.move_to_end(turn, last=False)
        gone = loop.create_task(until_gone(receive))
        try:
            await asyncio.wait((turn, gone), timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            if turn.done() and not turn.exception():
                self._give_up(turn.result())
            raise
        finally:
            gone.cancel()
            self._waiting.pop(turn, None)
        if turn.done():
            return turn.result()
        if gone.done():
            return None
        raise Refusal(503, "queue_timeout", f"no worker became free within --router-queue-timeout {self._timeout:g} s")

    def _give_up(self, worker: Worker) -> None:
        worker.outstanding -= 1
        self.leave()

    def _full(self) -> Refusal:
        return Refusal(503, "queue_full", f"{len(self._waiting)} requests wait already (--router-queue-size)")


def make_gate(options: RouterOptions, registry: WorkerRegistry, policy: Policy) -> Gate | None:
    """Return the gate that the options ask for; None without a limit."""
    each, total = options.router_max_worker_requests, options.router_max_requests
    if not (each or total):
        return None
    size, timeout = options.router_queue_size, options.router_queue_timeout
    return Gate(registry, policy, total=total, each=each, size=size, timeout=timeout)
