"""The short way of a plain request: from one socket's callback to the other socket, without a task or a queue.

It is for POSTs with a plain head, in a router without middleware and limits. Where the first engine fails before the
answer begins, the request goes, as its client sent it, back to its parser, and so to `Proxy`.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from .errors import ClientGoneError, LocalError, LostError, UpstreamError
from .heads import client_head
from .known_heads import cut_head
from .lane import Handed
from .policies import RouteRequest

if TYPE_CHECKING:
    import asyncio

    from .connection import UpstreamConnection
    from .lane import Client, Lane
    from .workers import Worker

__all__ = ["CLIENT_LEFT", "CUT_SHORT", "Express"]

_log = logging.getLogger("miles_router")

CLIENT_LEFT = 499
CUT_SHORT = 502
_JOIN_BELOW_BYTES = 1 << 16
_LEAST_PIECE = 1 << 12
_ANY_REQUEST = RouteRequest((), b"")


class Express:
    """A client connection's requests on the short way, one after the other.

    The first attributes are those that uvicorn's protocol asks of its cycle, in whose place this stands.
    """

    __slots__ = (
        "_behind", "_body_at", "_chunked", "_client", "_connecting", "_connection", "_head", "_held", "_lane", "_left",
        "_loop", "_pieces", "_reused", "_size", "_started", "_waits", "_worker",
        "keep_alive", "more_body", "response_complete", "response_started", "waiting_for_100_continue",
    )  # fmt: skip

    def __init__(self, client: Client, lane: Lane, loop: asyncio.AbstractEventLoop) -> None:
        self._client = client
        self._lane = lane
        self._loop = loop
        self.keep_alive = True
        self.more_body = self.waiting_for_100_continue = False
        self.response_started = self.response_complete = True
        self._connection: UpstreamConnection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._worker: Worker | None = None
        self._pieces: list[bytes] = []
        self._behind: list[bytes] = []
        self._left = self._held = 0
        self._waits = False

    # -- the client's side

    def begin(self, data: bytes) -> bool:
        """Take a request whose first bytes are `data`; False, and nothing happened, if it has to go the long way."""
        cut = cut_head(data)
        if cut is None:
            return False
        key, at, size, body_at = cut
        lane = self._lane
        head = lane.requests.find(key, at)
        held = len(data) - body_at
        if head is None or size > lane.max_body or lane.bodies.held + held > lane.bodies.limit:
            return False
        lane.bodies.held += held
        self._held = held
        self._head = head
        self._body_at = body_at
        self._pieces = [data]
        self.response_started = self.response_complete = False
        self._left = body_at + size - len(data)
        if self._left > 0:
            self.more_body = True
        else:
            self._whole(size)
        return True

    def more(self, data: bytes) -> None:
        """Take what a client sends further: the rest of the body, or the next request, which has to wait."""
        if not self.more_body:
            self._wait_behind(data)
            return
        if len(self._pieces[-1]) < _LEAST_PIECE:  # not many small objects for one body
            self._pieces[-1] += data
        else:
            self._pieces.append(data)
        size = len(data)
        self._left -= size
        bodies = self._lane.bodies
        if bodies.held + size > bodies.limit:
            self.more_body = False
            self._take_back(None)
            return
        bodies.held += size
        self._held += size
        if self._left <= 0:
            self.more_body = False
            self._whole(sum(map(len, self._pieces)) + self._left - self._body_at)

    def _wait_behind(self, data: bytes) -> None:
        self._behind.append(data)
        self._client.flow.pause_reading()

    def _whole(self, size: int) -> None:
        if self._left < 0:
            last = self._pieces[-1]
            self._pieces[-1] = last[: self._left]
            self._wait_behind(last[self._left :])
        self._started = self._loop.time()
        lane = self._lane
        workers = lane.registry.healthy
        if not workers:
            self._hand_over(None, {})
            return
        worker = self._worker = lane.policy.choose(workers, self._request() if lane.looks else _ANY_REQUEST)
        worker.outstanding += 1
        worker.sent += 1
        self._size = size
        connection = worker.pool.take_idle()
        if connection is None:
            self._connecting = self._loop.create_task(self._connect(worker))
        else:
            self._ask(worker, connection, reused=True)

    async def _connect(self, worker: Worker) -> None:
        try:
            connection = await worker.pool.connect()
        except LocalError:
            worker.sent -= 1
            self._hand_over(worker, {})
        except UpstreamError as error:
            worker.outstanding -= 1
            self._lane.registry.failed(worker, error)
            self._hand_over(None, {worker: error})
        else:
            self._connecting = None
            self._ask(worker, connection, reused=False)

    def _ask(self, worker: Worker, connection: UpstreamConnection, *, reused: bool) -> None:
        self._connection = connection
        self._reused = reused
        lane = self._lane
        lane.exchanges.begin(connection, worker, generates=self._head.generates)
        connection.begin_direct(self, lane.answers, self._upstream_pieces(worker))

    def _request(self) -> RouteRequest:
        return RouteRequest(self._head.headers, b"".join(self._pieces)[self._body_at :])

    def _upstream_pieces(self, worker: Worker) -> list[bytes]:
        first, size = self._pieces[0][self._body_at :], self._size
        head = b"%b%d\r\n%b\r\n" % (self._head.start, size, worker.key_line)
        if size < _JOIN_BELOW_BYTES:
            return [b"".join((head, first, *self._pieces[1:]))]
        return [head, first, *self._pieces[1:]]

    def resume(self) -> None:
        """Go on: the client has read what was sent to it."""
        if self._connection is not None:
            self._connection.resume()
        elif self._waits:
            self._go_on()

    def leave(self) -> None:
        """Take note that the client has left."""
        self.more_body = False
        self.response_complete = True
        if self._connection is not None:
            self._connection.fail(ClientGoneError("the client left"))
        elif self._connecting is not None and self._worker is not None:
            self._connecting.cancel()
            self._connecting = None
            self._worker.outstanding -= 1
            self._lane.metrics.observe(CLIENT_LEFT, self._loop.time() - self._started)
        self._forget()
        self._behind = []
        self._waits = False

    # -- the engine's side

    def pass_on(self, data: bytes, *, last: bool) -> None:
        """Send a piece of an answer that the client gets byte for byte, but for the engine's name in its head."""
        if not self.response_started:
            self.response_started = True
            self._forget()
            if self._connection is not None:
                data = data.replace(b"\r\n\r\n", self._connection.pool.head_end, 1)
            if not self.keep_alive:
                data = data.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)
        self._write(data, last=last)

    def parsed(self, connection: UpstreamConnection) -> None:
        """Send what the parser of the engine's connection has found so far."""
        if not connection.answered:
            return
        out: list[bytes] = []
        if not self.response_started:
            self.response_started = True
            self._forget()
            head, self._chunked = client_head(connection, keep_alive=self.keep_alive)
            out.append(head)
        chunks, size = connection.take_chunks()
        if size and self._chunked:
            out += (b"%x\r\n" % size, *chunks, b"\r\n")
        elif size:
            out += chunks
        if connection.complete and self._chunked:
            out.append(b"0\r\n\r\n")
        self._write(b"".join(out), last=connection.complete)

    def _write(self, data: bytes, *, last: bool) -> None:
        if data:
            self._client.transport.write(data)
        if last:
            self._finish()
        elif self._client.flow.write_paused and self._connection is not None:
            self._connection.pause()

    def _finish(self) -> None:
        worker, connection = self._release()
        lane = self._lane
        lane.registry.answered(worker, connection.status)
        lane.metrics.observe(connection.status, self._loop.time() - self._started)
        self._end()

    def _release(self) -> tuple[Worker, UpstreamConnection]:
        """Give back what the request held."""
        worker, connection = self._worker, self._connection
        assert worker is not None
        assert connection is not None
        self._worker = self._connection = None
        worker.outstanding -= 1
        self._lane.exchanges.end(connection)
        connection.finish()
        return worker, connection

    def _end(self) -> None:
        self.response_complete = True
        if not self.keep_alive:
            self._client.transport.close()
        else:
            self._go_on()

    def _go_on(self) -> None:
        """Let the client ask again; one that does not read its answers gets no more of them into the memory."""
        self._waits = self._client.flow.write_paused
        if self._waits:
            self._client.flow.pause_reading()
        else:
            behind, self._behind = self._behind, []
            self._client.answered(behind)

    def failed(self, error: UpstreamError) -> None:
        """Take note that the exchange with the engine ended early; its connection is closed."""
        worker, connection = self._release()
        lane = self._lane
        if isinstance(error, ClientGoneError):
            lane.metrics.observe(CLIENT_LEFT, self._loop.time() - self._started)
        elif self.response_started:
            # that the connection closes is all that can still be said
            _log.warning("worker %s %s in the middle of its answer", worker.url, error)
            lane.registry.failed(worker, error)
            lane.metrics.observe(CUT_SHORT, self._loop.time() - self._started)
            self.response_complete = True
            self._behind = []
            self._client.transport.close()
        elif self._reused and isinstance(error, LostError) and not connection.received:
            # engines close idle connections when they like: one that dies unused says nothing about its engine
            worker.outstanding += 1
            self._worker = worker
            self._connecting = self._loop.create_task(self._connect(worker))
        else:
            lane.registry.failed(worker, error)
            self._hand_over(None, {worker: error})

    def _hand_over(self, worker: Worker | None, failed: dict[Worker, UpstreamError]) -> None:
        self._worker = self._connecting = None
        self._take_back(Handed(self._started, worker, failed))

    def _take_back(self, handed: Handed | None) -> None:
        self.response_started = self.response_complete = True
        pieces, self._behind = [*self._pieces, *self._behind], []
        self._forget()
        self._client.parse(pieces, handed)

    def _forget(self) -> None:
        """Hold the request's body no longer."""
        self._pieces = []
        self._lane.bodies.held -= self._held
        self._held = 0
