"""A request for inference goes to one engine, and its answer comes back as it arrives.

An attempt ends in one of four ways. The engine answers: status, headers and body pass through. It cannot be
connected: it is quarantined and any other engine is tried. It hangs up before answering: one other engine is tried,
no more, since a request that kills engines must not kill all of them. It stays silent for too long: nobody is tried.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

from .connection import ClientGoneError, ConnectError, LostError, SilentError, UpstreamConnection, UpstreamError

if TYPE_CHECKING:
    from .policies import Policy
    from .workers import Worker, WorkerRegistry

__all__ = ["PREFERRED", "BodyTooLargeError", "Message", "Proxy", "Receive", "Scope", "Send", "read_body", "send_json"]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_log = logging.getLogger("miles_router")

# `expect` is not hop-by-hop, but the server in front has answered it and the body is here
_NOT_FORWARDED = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer trailers "
    b"transfer-encoding upgrade content-length expect".split()
)
_NOT_RETURNED = _NOT_FORWARDED - {b"content-length", b"expect"}
_PLAIN_CONNECTION = frozenset((b"keep-alive", b"close", b"Keep-Alive", b"Close"))
_MAX_LOST = 2
_BLAME: dict[type[UpstreamError], tuple[int, str]] = {
    ConnectError: (503, "worker_unreachable"),
    LostError: (502, "worker_lost"),
    SilentError: (504, "worker_timeout"),
}
RETRY_AFTER_S = 1
PREFERRED = "miles.worker"
"""Where a request's scope names the engine that middleware chose for it."""


class BodyTooLargeError(Exception):
    """A request body exceeds the limit; nothing was sent to any engine, nor back."""


async def read_body(receive: Receive, limit: int) -> bytes | None:
    """Return the whole request body, or None if the client left before sending all of it.

    Raises `BodyTooLargeError` as soon as there are more than `limit` bytes.
    """
    parts: list[bytes] = []
    size = 0
    while (message := await receive())["type"] == "http.request":
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise BodyTooLargeError
        if not message.get("more_body", False):
            return b"".join((*parts, part)) if parts else part
        parts.append(part)
    return None


async def send_json(send: Send, status: int, value: object, *extra: tuple[bytes, bytes]) -> None:
    """Answer with a JSON value and extra headers."""
    body = msgspec.json.encode(value)
    length = str(len(body)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", length), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


class Proxy:
    """Forward requests to the healthy workers of `registry`; a silent engine is given up after `timeout` seconds.

    Bodies of more than `max_body` bytes are refused. `keep_authorization` is False where that header is our own token.
    """

    def __init__(
        self, registry: WorkerRegistry, policy: Policy, timeout: float, *, max_body: int, keep_authorization: bool
    ) -> None:
        self._registry = registry
        self._policy = policy
        self._timeout = timeout
        self._max_body = max_body
        self._not_forwarded = _NOT_FORWARDED if keep_authorization else _NOT_FORWARDED | {b"authorization"}
        self._active: set[UpstreamConnection] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward one HTTP request. Raises `BodyTooLargeError`."""
        body = await read_body(receive, self._max_body)
        if body is None:
            return
        failed: dict[Worker, UpstreamError] = {}
        preferred = scope.get(PREFERRED)
        while workers := self._candidates(failed):
            if preferred is not None:
                workers = [worker for worker in workers if worker.url == preferred] or workers
            worker = self._policy.choose(workers)
            worker.outstanding += 1
            try:
                await self._attempt(worker, scope, body, receive, send)
                return
            except UpstreamError as exc:
                failed[worker] = exc
                if isinstance(exc, ConnectError):
                    self._registry.quarantine(worker, str(exc))
            finally:
                worker.outstanding -= 1
        await self._refuse(send, failed)

    def _candidates(self, failed: dict[Worker, UpstreamError]) -> list[Worker]:
        """Return who may get the request now; nobody once it has cost too much."""
        if not failed:
            return self._registry.healthy
        errors = [type(error) for error in failed.values()]
        if SilentError in errors or errors.count(LostError) >= _MAX_LOST:
            return []
        return [worker for worker in self._registry.healthy if worker not in failed]

    async def expire_silent(self) -> None:
        """Fail exchanges whose engine has been silent for too long, for ever; one timer for all requests."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(1.0, self._timeout / 4))
            before = loop.time() - self._timeout
            for connection in list(self._active):
                if connection.last_activity < before and not connection.paused:
                    connection.fail(SilentError(f"sent nothing for {self._timeout:g} s"))

    async def _attempt(self, worker: Worker, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Get one answer from `worker` to the client. Raises an `UpstreamError` while nothing was sent back."""
        head = _request_head(scope, worker.host, len(body), self._not_forwarded)
        head_only = scope["method"] == "HEAD"
        connection = worker.pool.take_idle()
        if connection is not None:
            try:
                connection.begin(head, body, head_only=head_only)
                await self._relay(worker, connection, receive, send)
                return
            except LostError:
                # engines close idle connections when they like: one that dies unused says nothing about its engine
                if connection.received:
                    raise
        connection = await worker.pool.connect()
        connection.begin(head, body, head_only=head_only)
        await self._relay(worker, connection, receive, send)

    async def _relay(self, worker: Worker, connection: UpstreamConnection, receive: Receive, send: Send) -> None:
        self._active.add(connection)
        watcher = asyncio.get_running_loop().create_task(_fail_on_disconnect(receive, connection))
        try:
            await connection.wait_answer()
            await send(_response_start(connection))
            more = True
            while more:
                await connection.wait_more()
                data, more = connection.take()
                if data or not more:
                    await send({"type": "http.response.body", "body": data, "more_body": more})
        except ClientGoneError:
            return
        except UpstreamError as exc:
            if not connection.answered:
                raise
            # the server closes the client's connection when we return, which is all that can still be said
            _log.warning("worker %s %s in the middle of its answer", worker.url, exc)
        finally:
            watcher.cancel()
            self._active.discard(connection)
            connection.finish()

    async def _refuse(self, send: Send, failed: dict[Worker, UpstreamError]) -> None:
        retry = (b"retry-after", str(RETRY_AFTER_S).encode())
        if failed:
            worker, error = next(reversed(failed.items()))
            status, kind = _BLAME[type(error)]
            text = f"worker {worker.url} {error}"
            detail = {"message": text, "type": kind, "worker": worker.url, "code": status}
            await send_json(send, status, {"error": detail}, retry)
            return
        unhealthy = [f"{worker.url} {worker.reason}" for worker in self._registry]
        text = "no healthy worker: " + "; ".join(unhealthy) if unhealthy else "no worker is registered"
        await send_json(send, 503, {"error": {"message": text, "type": "no_worker", "code": 503}}, retry)


async def _fail_on_disconnect(receive: Receive, connection: UpstreamConnection) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    connection.fail(ClientGoneError("the client left"))


def _nominated(headers: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return the headers that `Connection` declares to be for this hop only."""
    names: set[bytes] = set()
    for name, value in headers:
        if name.lower() == b"connection" and value not in _PLAIN_CONNECTION:
            names.update(token.strip() for token in value.lower().split(b","))
    return frozenset(names) - {b"host", b"content-length"}


def _request_head(scope: Scope, host: bytes, length: int, not_forwarded: frozenset[bytes]) -> bytes:
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    parts = [scope["method"].encode(), b" ", scope["raw_path"]]
    if scope["query_string"]:
        parts += (b"?", scope["query_string"])
    parts.append(b" HTTP/1.1\r\n")
    dropped = not_forwarded | _nominated(headers)
    framed = length > 0
    hosted = False
    for name, value in headers:
        if name in dropped:
            framed = framed or name in (b"content-length", b"transfer-encoding")
            continue
        if name == b"host":
            hosted = True
        parts += (name, b": ", value, b"\r\n")
    if not hosted:
        parts += (b"host: ", host, b"\r\n")
    if framed:
        parts.append(b"content-length: %d\r\n" % length)
    parts.append(b"\r\n")
    return b"".join(parts)


def _response_start(connection: UpstreamConnection) -> Message:
    dropped = _NOT_RETURNED | _nominated(connection.headers)
    headers = [pair for pair in connection.headers if pair[0].lower() not in dropped]
    return {"type": "http.response.start", "status": connection.status, "headers": headers}
