"""A request for inference goes to one engine, and its answer comes back as it arrives.

An attempt ends in one of five ways. The engine answers: status, headers and body pass through. It cannot be
connected: it is quarantined and any other engine is tried. It hangs up before answering, or proves to be hung: one
other engine is tried, no more, since a request that kills engines must not kill all of them. It stays silent for too
long: nobody is tried.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from .errors import ClientGoneError, LocalError, LostError, UpstreamError
from .exchanges import Exchanges
from .express import CLIENT_LEFT, CUT_SHORT
from .heads import request_head, response_start
from .lane import HANDED
from .messages import read_body, send_json, until_gone
from .routing import Refusal, Route

if TYPE_CHECKING:
    from .connection import UpstreamConnection
    from .gate import Gate
    from .lane import Handed
    from .memory import BodyMemory
    from .messages import Receive, Scope, Send
    from .metrics import Metrics
    from .policies import Policy
    from .workers import Worker, WorkerRegistry

__all__ = ["Proxy", "generates"]

_log = logging.getLogger("miles_router")

_CHEAP = frozenset(("/tokenize", "/detokenize"))
"""What an engine answers to a POST without its scheduler."""


def generates(path: str) -> bool:
    """Tell whether an engine's scheduler has to work for the answer to a POST."""
    return path not in _CHEAP


class Proxy:
    """Forward requests to the healthy workers of `registry`.

    Bodies of more than `max_body` bytes are refused; all together are counted in `bodies`. Without a `gate` nothing is
    limited.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        policy: Policy,
        *,
        gate: Gate | None,
        metrics: Metrics,
        max_body: int,
        bodies: BodyMemory,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._gate = gate
        self._metrics = metrics
        self._max_body = max_body
        self._bodies = bodies
        self.exchanges = Exchanges()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request. Raises `BodyTooLargeError`."""
        now = asyncio.get_running_loop().time
        started = now()
        handed: Handed | None = scope.get(HANDED)
        try:
            if self._gate is not None:
                self._gate.check()
            body = await read_body(receive, self._max_body, self._bodies)
            if body is None:
                return
            try:
                started = now() if handed is None else handed.started
                status = await self._forward(Route(scope, body), handed, scope, receive, send)
            finally:
                self._bodies.give(len(body))
        except Refusal as refusal:
            status = refusal.status
            retry_after = (b"retry-after", str(refusal.retry_after).encode())
            await send_json(send, status, {"error": refusal.detail}, retry_after)
        finally:
            if handed is not None:
                handed.drop()
        self._metrics.observe(status, now() - started)

    async def _forward(self, route: Route, handed: Handed | None, scope: Scope, receive: Receive, send: Send) -> int:
        """Return the status that the client got. Raises `Refusal`."""
        worker = None
        if handed is not None:
            worker, route.failed = handed.take(), handed.failed
        while True:
            if worker is None:
                worker = self._next(route) if self._gate is None else await self._gate.enter(route, receive)
            if worker is None:
                return CLIENT_LEFT
            try:
                return await self._attempt(worker, scope, route.request.body, receive, send)
            except LocalError as exc:
                raise Refusal(503, "router_exhausted", str(exc)) from exc
            except UpstreamError as exc:
                route.failed[worker] = exc
                self._registry.failed(worker, exc)
            finally:
                worker.outstanding -= 1
                if self._gate is not None:
                    self._gate.leave()
            worker = None

    def _next(self, route: Route) -> Worker:
        workers = route.candidates(self._registry)
        if not workers:
            raise route.refusal(self._registry)
        worker = self._policy.choose(workers, route.request)
        worker.outstanding += 1
        return worker

    async def _attempt(self, worker: Worker, scope: Scope, body: bytes, receive: Receive, send: Send) -> int:
        """Get one answer from `worker` to the client; return its status.

        Raises an `UpstreamError` while nothing was sent back.
        """
        worker.sent += 1
        head = request_head(scope, worker.host, len(body), worker.key_line)
        head_only = scope["method"] == "HEAD"
        connection = worker.pool.take_idle()
        if connection is not None:
            try:
                connection.begin(head, body, head_only=head_only)
                return await self._relay(worker, connection, scope, receive, send)
            except LostError:
                # engines close idle connections when they like: one that dies unused says nothing about its engine
                if connection.received:
                    raise
        connection = await worker.pool.connect()
        connection.begin(head, body, head_only=head_only)
        return await self._relay(worker, connection, scope, receive, send)

    async def _relay(
        self, worker: Worker, connection: UpstreamConnection, scope: Scope, receive: Receive, send: Send
    ) -> int:
        works = scope["method"] == "POST" and generates(scope["path"])
        self.exchanges.begin(connection, worker, generates=works)
        watcher = asyncio.get_running_loop().create_task(_fail_on_disconnect(receive, connection))
        try:
            await connection.wait_answer()
            await send(response_start(connection))
            more = True
            while more:
                await connection.wait_more()
                data, more = connection.take()
                if data or not more:
                    await send({"type": "http.response.body", "body": data, "more_body": more})
        except ClientGoneError:
            return CLIENT_LEFT
        except UpstreamError as exc:
            if not connection.answered:
                raise
            # the server closes the client's connection when we return, which is all that can still be said
            _log.warning("worker %s %s in the middle of its answer", worker.url, exc)
            self._registry.failed(worker, exc)
            return CUT_SHORT
        finally:
            watcher.cancel()
            self.exchanges.end(connection)
            connection.finish()
        self._registry.answered(worker, connection.status)
        return connection.status


async def _fail_on_disconnect(receive: Receive, connection: UpstreamConnection) -> None:
    await until_gone(receive)
    connection.fail(ClientGoneError("the client left"))
