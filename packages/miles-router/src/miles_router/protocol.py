"""uvicorn's HTTP/1.1 protocol with bounds: how long a client may take to send a request, how long its head may be.

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

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._head_bytes += self._piece
        else:
            self._since = self.loop.time()
        self._piece = len(data)
        super().data_received(data)
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._refuse(431)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        self._since = self.loop.time()

    def on_headers_complete(self) -> None:
        self._in_head = False
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

    def expire(self, now: float) -> None:
        """Close the connection if its client takes too long to send a request."""
        if self.transport.is_closing():
            return
        if self._in_head:
            late = now - self._since > HEAD_TIMEOUT_S
        else:
            cycle = self.cycle
            late = cycle.more_body and not (self.flow.read_paused or cycle.waiting_for_100_continue)
            late = late and now - self._since > BODY_TIMEOUT_S
        if not late:
            return
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            self._refuse(408)
        else:
            self.transport.abort()

    def _refuse(self, status: int) -> None:
        line, text = _REFUSALS[status]
        head = b"HTTP/1.1 %b\r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
        self.transport.write(head % (line, len(text)) + text)
        self.transport.close()


async def expire_slow(connections: Collection[Any]) -> None:
    """Close connections whose clients are too slow, for ever; one timer for all of them."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(_SWEEP_S)
        now = loop.time()
        for connection in list(connections):
            connection.expire(now)
