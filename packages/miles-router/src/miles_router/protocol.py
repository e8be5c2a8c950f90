"""uvicorn's HTTP/1.1 protocol with bounds: how long a client may take, how long a head may be.

What is no proper request is refused by the parser (llhttp, strict); its bytes never reach an engine, as every request
is written anew for the engine that gets it.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    from collections.abc import Collection

__all__ = ["BODY_TIMEOUT_S", "HEAD_TIMEOUT_S", "MAX_HEAD_BYTES", "BoundedProtocol", "expire_slow"]

HEAD_TIMEOUT_S = 30.0
"""Longest time from a connection's begin, or a request's first byte, to the end of its head."""
BODY_TIMEOUT_S = 60.0
"""Longest time between two pieces of a body."""
MAX_HEAD_BYTES = 64 << 10
_SWEEP_S = 1.0

_REFUSALS = {
    408: (b"408 Request Timeout", b"the request did not arrive in time"),
    431: (b"431 Request Header Fields Too Large", b"the request's head is longer than 65536 bytes"),
}


class BoundedProtocol(HttpToolsProtocol):
    """One client's connection."""

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

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += self._piece
        elif self.cycle is not None and self.cycle.more_body:
            self._since = self.loop.time()
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
        super().on_headers_complete()

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

    def expire(self, now: float, write_timeout: float) -> None:
        """Close the connection if its client takes too long to send a request, or to read an answer."""
        if self.transport.is_closing():
            return
        if self._unread and self._reads_nothing(now, write_timeout):
            self.transport.abort()
        elif self._in_head:
            if self.cycle is not None and not self.cycle.response_complete:
                self._since = now  # what follows an answer under way has time until that is over
            elif now - self._since > HEAD_TIMEOUT_S:
                self._refuse(408)
        elif self._is_late(now):
            self._hang_up()

    def _reads_nothing(self, now: float, timeout: float) -> bool:
        unread = self.transport.get_write_buffer_size()
        if unread < self._unread:
            self._unread_since, self._unread = now, unread
        return now - self._unread_since > timeout

    def _is_late(self, now: float) -> bool:
        cycle = self.cycle
        waits = cycle.more_body and not (self.flow.read_paused or cycle.waiting_for_100_continue)
        return waits and now - self._since > BODY_TIMEOUT_S

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
