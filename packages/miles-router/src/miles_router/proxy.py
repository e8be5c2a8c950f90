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

from .connection import ClientGoneError, LostError, SilentError, UpstreamConnection, UpstreamError
from .heads import not_forwarded, request_head, response_start
from .messages import (
    CHOSEN,
    PREFERRED,
    RETRY_AFTER,
    BodyTooLargeError,
    Message,
    Receive,
    Scope,
    Send,
    read_body,
    send_json,
)
from .routing import Refusal, Route

if TYPE_CHECKING:
    from .gate import Gate
    from .metrics import Metrics
    from .policies import Policy
    from .workers import Worker, WorkerRegistry

__all__ = [
    "CHOSEN",
    "PREFERRED",
    "BodyTooLargeError",
    "Message",
    "Proxy",
    "Receive",
    "Scope",
    "Send",
    "read_body",
    "send_json",
]

_log = logging.getLogger("miles_router")

_CLIENT_LEFT = 499
_CUT_SHORT = 502


class Proxy:
    """Forward requests to the healthy workers of `registry`; a silent engine is given up after `timeout` seconds.

    Bodies of more than `max_body` bytes are refused. `keep_authorization` is False where that header is our own token.
    Without a `gate` nothing is limited.
    """

    def __init__(
        self,
        registry: WorkerRegistry,
        policy: Policy,
        timeout: float,
        *,
        gate: Gate | None,
        metrics: Metrics,
        max_body: int,
        keep_authorization: bool,
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._timeout = timeout
        self._gate = gate
        self._metrics = metrics
        self._max_body = max_body
        self._without = not_forwarded(keep_authorization=keep_authorization)
        self._active: set[UpstreamConnection] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request. Raises `BodyTooLargeError`."""
        now = asyncio.get_running_loop().time
        try:
            if self._gate is not None:
                self._gate.check()
            body = await read_body(receive, self._max_body)
            if body is None:
                return
            started = now()
            status = await self._forward(Route(scope, body), scope, receive, send)
        except Refusal as refusal:
            started, status = now(), refusal.status
            await send_json(send, status, {"error": refusal.detail}, RETRY_AFTER)
        self._metrics.observe(status, now() - started)

    async def _forward(self, route: Route, scope: Scope, receive: Receive, send: Send) -> int:
        """Return the status that the client got. Raises `Refusal`."""
        while (worker := await self._next(route, receive)) is not None:
            try:
                return await self._attempt(worker, scope, route.request.body, receive, send)
            except UpstreamError as exc:
                route.failed[worker] = exc
                self._registry.failed(worker, exc)
            finally:
                worker.outstanding -= 1
                if self._gate is not None:
                    self._gate.leave()
        return _CLIENT_LEFT

    async def _next(self, route: Route, receive: Receive) -> Worker | None:
        if self._gate is not None:
            return await self._gate.enter(route, receive)
        workers = route.candidates(self._registry)
        if not workers:
            raise route.refusal(self._registry)
        worker = self._policy.choose(workers, route.request)
        worker.outstanding += 1
        return worker

    def waits_for(self, worker: Worker) -> bool:
        """Tell whether it is a worker's turn in any exchange, and not that of a client which reads slowly."""
        return any(connection.pool is worker.pool and not connection.paused for connection in self._active)

    def abandon(self, worker: Worker, error: UpstreamError) -> None:
        """End every exchange with a worker."""
        for connection in list(self._active):
            if connection.pool is worker.pool:
                connection.fail(error)

    async def expire_silent(self) -> None:
        """Fail exchanges whose engine has been silent for too long, for ever; one timer for all requests."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            before = loop.time() - self._timeout
            for connection in list(self._active):
                if connection.last_activity < before and not connection.paused:
                    connection.fail(SilentError(f"sent nothing for {self._timeout:g} s"))

    async def _attempt(self, worker: Worker, scope: Scope, body: bytes, receive: Receive, send: Send) -> int:
        """Get one answer from `worker` to the client; return its status.

        Raises an `UpstreamError` while nothing was sent back.
        """
        worker.sent += 1
        head = request_head(scope, worker.host, len(body), self._without)
        head_only = scope["method"] == "HEAD"
        connection = worker.pool.take_idle()
        if connection is not None:
            try:
                connection.begin(head, body, head_only=head_only)
                return await self._relay(worker, connection, receive, send)
            except LostError:
                # engines close idle connections when they like: one that dies unused says nothing about its engine
                if connection.received:
                    raise
        connection = await worker.pool.connect()
        connection.begin(head, body, head_only=head_only)
        return await self._relay(worker, connection, receive, send)

    async def _relay(self, worker: Worker, connection: UpstreamConnection, receive: Receive, send: Send) -> int:
        self._active.add(connection)
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
            return _CLIENT_LEFT
        except UpstreamError as exc:
            if not connection.answered:
                raise
            # the server closes the client's connection when we return, which is all that can still be said
            _log.warning("worker %s %s in the middle of its answer", worker.url, exc)
            self._registry.failed(worker, exc)
            return _CUT_SHORT
        finally:
            watcher.cancel()
            self._active.discard(connection)
            connection.finish()
        self._registry.answered(worker, connection.status)
        return connection.status


async def _fail_on_disconnect(receive: Receive, connection: UpstreamConnection) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    connection.fail(ClientGoneError("the client left"))
