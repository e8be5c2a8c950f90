"""uvicorn's HTTP/1.1 protocol with bounds: how long a client may take, how long a head may be.

What is no proper request is refused by the parser (llhttp, strict); its bytes never reach an engine, as every request
is written anew for the engine that gets it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .app import RouterApp
from .express import Express
from .lane import HANDED

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from .lane import Handed, Lane

__all__ = ["BODY_TIMEOUT_S", "HEAD_TIMEOUT_S", "KEEP_ALIVE_S", "MAX_HEAD_BYTES", "BoundedProtocol", "expire_slow"]

HEAD_TIMEOUT_S = 30.0
"""Longest time from a connection's begin, or a request's first byte, to the end of its head."""
BODY_TIMEOUT_S = 60.0
"""Longest time between two pieces of a body, where it arrives at `_LEAST_RATE` otherwise."""
KEEP_ALIVE_S = 600.0
"""Time between two requests: longer than any client's own limit, so that no connection closes while it is reused."""
MAX_HEAD_BYTES = 64 << 10
_LEAST_RATE = 1024
"""Bytes of a body in a second; one that is slower is late the sooner, so that a byte now and then holds no place."""
_SWEEP_S = 1.0

_REFUSALS = {
    408: (b"408 Request Timeout", b"the request did not arrive in time"),
    431: (b"431 Request Header Fields Too Large", b"the request's head is longer than 65536 bytes"),
}


class BoundedProtocol(HttpToolsProtocol):
    """One client's connection.

    Requests that can go the short way never see the parser, which then stands between two messages.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._in_head = True
        self._head_bytes = 0  # of the pieces before the last
        self._piece = 0
        self._since = self.loop.time()
        self._refused = 0
        self._between = 0
        self._unread_since = 0.0
        self._unread = 0
        self._idle_since = 0.0
        self._lane = self.app.lane if isinstance(self.app, RouterApp) else None
        self._express: Express | None = None
        self._handed: Handed | None = None
        self._between_messages = True
        self._running: RequestResponseCycle | None = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._express is not None:
            if self.cycle is self._express:
                self.cycle = None  # type: ignore[assignment]
            self._express.leave()
        super().connection_lost(exc)
        if self._running is not None and not self._running.response_complete:  # `cycle` may be one that waits behind it
            self._running.disconnected = True
            self._running.message_event.set()

    def data_received(self, data: bytes) -> None:
        if self._lane is None or not self._goes_short(data, self._lane):
            self._parse(data)

    def _goes_short(self, data: bytes, lane: Lane) -> bool:
        express, cycle = self._express, self.cycle
        if cycle is None or cycle.response_complete:
            if not self._between_messages:
                return False
            if express is None:
                express = self._express = Express(self, lane, self.loop)
            self.cycle = express  # type: ignore[assignment]
            # before: where nobody can serve the request the parser gets it now, and may end up in the next one's head
            in_head, self._in_head = self._in_head, False
            if not express.begin(data):
                self.cycle, self._in_head = cycle, in_head
                return False
            if express.more_body:
                self._since = self.loop.time()
        elif express is None or cycle is not express:
            return False
        else:
            express.more(data)
            self._arrived(len(data))
        return True

    def _arrived(self, size: int) -> None:
        self._since = min(self.loop.time(), self._since + size / _LEAST_RATE)

    def answered(self, behind: Sequence[bytes]) -> None:
        """Go on with what came behind a request that went the short way."""
        self.on_response_complete()
        for piece in behind:
            if not self.transport.is_closing():
                self.data_received(piece)

    def parse(self, pieces: Sequence[bytes], handed: Handed | None) -> None:
        """Take a request that began on the short way, and what came behind it."""
        keep_alive = self.cycle.keep_alive
        self.cycle = None  # type: ignore[assignment]
        self._handed = handed
        for piece in pieces:
            self._parse(piece)
        self.cycle.keep_alive = self.cycle.keep_alive and keep_alive

    def _parse(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += self._piece
        elif self.cycle is not None and self.cycle.more_body:
            self._arrived(len(data))
            self._between += len(data)
        self._piece = len(data)
        super().data_received(data)
        if self._between > MAX_HEAD_BYTES:
            # closing would wait for a client that only sends, and the request may have its answer already
            self.transport.abort()
        elif self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refused = 431
            self.send_400_response("")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._between_messages = False
        self._in_head = True
        self._head_bytes = 0
        self._since = self.loop.time()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._in_head:  # later ones are trailers, which nobody reads
            super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._between = 0  # what lies between two pieces: extensions of chunks, trailers
        super().on_body(body)

    def on_headers_complete(self) -> None:
        self._in_head = False
        self._between = 0
        if self._head_bytes + self._piece > MAX_HEAD_BYTES and self._length_of_head() > MAX_HEAD_BYTES:
            self._refused = 431
            raise ValueError("the head is too long")
        if self._handed is not None:
            self.scope[HANDED], self._handed = self._handed, None  # type: ignore[typeddict-unknown-key]
        self._since = self.loop.time()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        # what follows an upgrade that is not taken up is lost to the parser
        self._between_messages = not self.parser.should_upgrade()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Go on with the next request. Not uvicorn's, which sets a timer for each."""
        self._running = None
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._start_asgi_task(cycle, app)
        else:
            self._idle_since = self.loop.time()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _length_of_head(self) -> int:
        return len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)

    def send_400_response(self, msg: str) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            # in the middle of another answer there is nothing that can be said
            self.transport.abort()
        elif self._refused:
            self._refuse(self._refused)
        else:
            super().send_400_response(msg)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread_since, self._unread = self.loop.time(), self.transport.get_write_buffer_size()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._unread = 0
        if self._express is not None:
            self._express.resume()

    def expire(self, now: float, write_timeout: float) -> None:
        """Close the connection if its client takes too long to send a request, or to read an answer."""
        if self._reads_nothing(now, write_timeout):
            self.transport.abort()
        elif self.transport.is_closing():
            return
        elif self._in_head:
            if self.cycle is not None and not self.cycle.response_complete:
                self._since = now  # what follows an answer under way has time until that is over
            elif now - self._since > HEAD_TIMEOUT_S:
                self._refuse(408)
        elif self._is_late(now):
            self._hang_up()
        elif self._is_idle(now):
            self.transport.close()

    def _reads_nothing(self, now: float, timeout: float) -> bool:
        unread = self.transport.get_write_buffer_size()
        # what is left to be sent holds a connection that closes open
        if unread < self._unread or (self.transport.is_closing() and not self._unread):
            self._unread_since, self._unread = now, unread
        return self._unread > 0 and now - self._unread_since > timeout

    def _is_idle(self, now: float) -> bool:
        cycle = self.cycle
        waits = not cycle.response_complete or cycle.more_body or self.flow.write_paused
        return not waits and now - self._idle_since > KEEP_ALIVE_S

    def _is_late(self, now: float) -> bool:
        cycle = self.cycle
        if not cycle.more_body or self.flow.read_paused or cycle.waiting_for_100_continue:
            self._since = now  # it is not the client that anybody waits for
        return now - self._since > BODY_TIMEOUT_S

    def _hang_up(self) -> None:
        if self.cycle.response_complete:  # a refusal would be taken for the next request's answer
            self.transport.close()
        elif self.cycle.response_started or self.pipeline:
            self.transport.abort()
        else:
            self._refuse(408)

    def _refuse(self, status: int) -> None:
        line, text = _REFUSALS[status]
        head = b"HTTP/1.1 %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (line, len(text)) + text)
        self.transport.close()


async def expire_slow(connections: Collection[Any], write_timeout: float) -> None:
    """Close connections whose clients are too slow, for ever; one timer for all of them.

    A client that reads nothing of its answer for `write_timeout` seconds is too slow.
    """
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_S)
        now = loop.time()
        for connection in list(connections):
            connection.expire(now, write_timeout)
