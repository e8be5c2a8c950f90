"""The upstream half: one HTTP/1.1 connection to an engine.

Nothing here decodes a body. A connection carries one exchange at a time; what arrives is kept as the parser's byte
chunks until the proxy takes them, and reading pauses while the client is slower than the engine.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import httptools

from .errors import LostError
from .known_heads import cut_head

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .errors import UpstreamError
    from .known_heads import KnownAnswers
    from .lane import Sink
    from .pool import ConnectionPool

__all__ = ["UpstreamConnection"]

_PAUSE_ABOVE_BYTES = 1 << 20
_JOIN_BELOW_BYTES = 1 << 16
_MAX_HEAD_BYTES = 1 << 20
"""Most bytes before a body begins, and between two pieces of it: what the parser keeps of them is not passed on."""
_FIRST_STATUS, _FIRST_FINAL_STATUS, _LAST_STATUS = 100, 200, 599


class UpstreamConnection(asyncio.Protocol):
    """One keep-alive connection to an engine, also the callback object of its own response parser."""

    def __init__(self, pool: ConnectionPool) -> None:
        self.pool = pool
        self._loop = asyncio.get_running_loop()
        self._parser: httptools.HttpResponseParser | None = httptools.HttpResponseParser(self)
        self._waiter: asyncio.Future[None] | None = None
        self._busy = False
        self._sink: Sink | None = None
        self._known: KnownAnswers | None = None
        """The heads to look an answer's up in; None where the parser has to read it."""
        self._left = 0  # bytes of the answer, where the parser reads none of it
        self._reset(head_only=False)

    def _reset(self, *, head_only: bool) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.received = False
        """Whether any byte of an answer arrived."""
        self.speaks = False
        """Whether any byte of a body arrived: streams have their heads before there is anything to say."""
        self.answered = False
        """Whether status and headers are complete."""
        self.complete = False
        self.paused = False
        self.last_activity = self._loop.time()
        self._head_only = head_only
        self._keep_alive = False
        self._error: UpstreamError | None = None
        self._chunks: list[bytes] = []
        self._buffered = 0
        self._between = 0

    # -- the side of who asks

    def begin(self, head: bytes, body: bytes, *, head_only: bool) -> None:
        """Send one request; `head_only` says that the answer will have no body, whatever its headers claim."""
        self._reset(head_only=head_only)
        self._busy = True
        if len(body) < _JOIN_BELOW_BYTES:
            self._transport.write(head + body)
        else:
            self._transport.writelines((head, body))

    def begin_direct(self, sink: Sink, known: KnownAnswers, request: Sequence[bytes]) -> None:
        """Send one request, whose method is not HEAD; `sink` is called with the answer as it arrives."""
        self._reset(head_only=False)
        self._busy = True
        self._sink = sink
        self._known = known
        if len(request) == 1:
            self._transport.write(request[0])
        else:
            self._transport.writelines(request)

    async def wait_answer(self) -> None:
        """Wait for status and headers. Raises an `UpstreamError` if they never come."""
        while not self.answered:
            if self._error is not None:
                raise self._error
            await self._wait()

    async def wait_more(self) -> None:
        """Wait until `take` has something to return or to raise."""
        while not (self._chunks or self.complete or self._error is not None):
            await self._wait()

    def take(self) -> tuple[bytes, bool]:
        """Return the body bytes that arrived since the last call, and whether more may follow.

        Raises the `UpstreamError` that cut the body short, once all that came before it was taken.
        """
        chunks = self._chunks
        if not chunks:
            if self._error is not None and not self.complete:
                raise self._error
            return b"", not self.complete
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._chunks = []
        self._buffered = 0
        self.resume()
        return data, not self.complete

    def take_chunks(self) -> tuple[list[bytes], int]:
        """Return the pieces of the body that the parser has found since the last call, and how many bytes they are."""
        chunks, size = self._chunks, self._buffered
        if chunks:
            self._chunks, self._buffered = [], 0
        return chunks, size

    def pause(self) -> None:
        """Read no more of the answer for now."""
        if not self.paused:
            self.paused = True
            self._transport.pause_reading()

    def resume(self) -> None:
        """Read on."""
        if self.paused:
            self.paused = False
            self.last_activity = self._loop.time()
            self._transport.resume_reading()

    def fail(self, error: UpstreamError) -> None:
        """End the exchange with `error` and close the connection, so that the engine sees its client leave."""
        if not self.complete and self._error is None:
            self._error = error
        self._keep_alive = False
        self._transport.abort()
        self._wake()

    def finish(self) -> None:
        """Give the connection back: to the pool if the answer came to its end and both sides keep it, else close it."""
        self._busy = False
        self._sink = self._known = None
        transport = self._transport
        if self.complete and self._keep_alive and self._error is None and not transport.get_write_buffer_size():
            self.pool.put(self)
        else:
            transport.abort()

    def close(self) -> None:
        """Close an idle connection."""
        self._transport.close()

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        sink = self._sink
        if sink is None:
            if self._waiter is not None and not self._waiter.done():
                self._waiter.set_result(None)
            return
        if self._known is None and self.answered:
            sink.parsed(self)
        if self._error is not None and not self.complete:
            sink.failed(self._error)

    # -- the transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        if not self._busy:  # an answer nobody asked for: the next request would get it
            self._transport.abort()
            return
        self.received = True
        self.last_activity = self._loop.time()
        if self._known is not None:
            if self._passes(data, self._known):
                return
            self._known = None
        self._between += len(data)
        try:
            self._parser.feed_data(data)  # type: ignore[union-attr]
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as exc:
            self.fail(LostError(f"sent an answer that is not plain HTTP/1.1: {exc}"))
            return
        if self._between > _MAX_HEAD_BYTES and not self.complete:
            self.fail(LostError(f"sent {self._between} bytes of an answer and nothing of its body"))
            return
        if self._buffered > _PAUSE_ABOVE_BYTES and self._sink is None and not self.complete:
            self.pause()
        self._wake()

    def _passes(self, data: bytes, known: KnownAnswers) -> bool:
        """Give a piece of an answer with a known head to the sink; False where the parser has to read it."""
        if self.answered:
            self.speaks = True
        else:
            cut = cut_head(data)
            if cut is None:
                return False
            key, at, size, body_at = cut
            self.status = known.find(key, at)
            if not self.status:
                return False
            self.answered = True
            self.speaks = len(data) > body_at
            self._left = body_at + size
        self._left -= len(data)
        if self._left <= 0:
            self.complete = True
            self._keep_alive = not self._left
            data = data[: self._left] if self._left else data  # more than one answer
        self._sink.pass_on(data, last=self.complete)  # type: ignore[union-attr]
        return True

    def connection_lost(self, exc: Exception | None) -> None:
        self._parser = None  # it refers back to this object
        self.pool.discard(self)
        if exc is None and self.answered and not self.complete and self._ends_at_close():
            self.complete = True
        elif not self.complete and self._error is None:
            self._error = LostError(f"closed the connection ({exc})" if exc else "closed the connection")
        self._keep_alive = False
        self._wake()

    def _ends_at_close(self) -> bool:
        framed = {b"content-length", b"transfer-encoding"}
        unframed = not any(name.lower() in framed for name, _ in self.headers)
        return self._error is None and self._known is None and unframed

    # -- the parser's side

    def on_message_begin(self) -> None:
        if self.complete:  # a second answer to one request
            self._error = LostError("sent more than one answer")

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self.answered:  # later ones are trailers
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()  # type: ignore[union-attr]
        if not _FIRST_STATUS <= status <= _LAST_STATUS:
            raise ValueError(f"status {status}")
        if status < _FIRST_FINAL_STATUS:  # informational: the answer follows
            self.headers = []
            return
        self.status = status
        self.answered = True
        if self._head_only:
            self.complete = True

    def on_body(self, chunk: bytes) -> None:
        if not self.complete:
            self.speaks = True
            self._between = 0
            self._chunks.append(chunk)
            self._buffered += len(chunk)

    def on_message_complete(self) -> None:
        if self.answered and not self.complete:
            self.complete = True
            self._keep_alive = self._parser.should_keep_alive()  # type: ignore[union-attr]
