"""Who changed the tokens: the header that says so, and the comparison that finds out who did not say so.

A middleware declares `changes_tokens`: True, and every answer that passes through it bears its name; False, and it is
trusted. One that declares nothing is compared: what comes out of it must be, byte for byte, what went in. Pieces that
pass through untouched cost one identity check each.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .messages import Message, Receive, Send

__all__ = ["HEADER", "LateChangeError", "Passage", "stamp_of"]

HEADER = b"x-miles-changed-tokens"
"""The response header with the comma-separated, percent-encoded names of the middleware that changed the answer."""
_FIRST_REFUSAL = 300


class LateChangeError(Exception):
    """A middleware that declares nothing changed the answer after its first piece had left."""


def stamp_of(reference: str) -> bytes:
    """Return a middleware's reference as it stands in the header."""
    return quote(reference, safe="/:.-_").encode()


class _Bytes:
    """What arrived and has not left yet; `differs` once something else leaves."""

    __slots__ = ("_waiting", "differs", "left")

    def __init__(self, pieces: Iterable[bytes] = ()) -> None:
        self._waiting: deque[bytes] = deque(pieces)
        self.differs = False
        self.left = False
        """Whether anything left."""

    def arrive(self, piece: bytes) -> None:
        if piece and not self.differs:
            self._waiting.append(piece)

    def leave(self, piece: bytes, *, last: bool) -> None:
        waiting = self._waiting
        self.left = self.left or bool(piece)
        if waiting and waiting[0] is piece:
            waiting.popleft()
        elif not self.differs:
            self._match(bytes(piece))
        self.differs = self.differs or bool(last and waiting)

    def _match(self, piece: bytes) -> None:
        waiting = self._waiting
        while piece:
            first = waiting.popleft() if waiting else b""
            size = min(len(first), len(piece))
            if not size or first[:size] != piece[:size]:
                self.differs = True
                waiting.clear()
                return
            piece = piece[size:]
            if size < len(first):
                waiting.appendleft(first[size:])


class Passage:
    """One inference request on its way through a middleware that declares True, or nothing.

    The names that the answer bears already are kept, whatever the middleware makes of its headers. Each time that the
    middleware passes the request on, it is compared anew, and so is the answer until some of it has left: what
    counts is the request that was answered.
    """

    __slots__ = (
        "_answer", "_arrived", "_declared", "_inner", "_name", "_refusal", "_request", "_start", "_told", "changed",
    )  # fmt: skip

    def __init__(self, name: bytes, *, declared: bool) -> None:
        self._name = name
        self._declared = declared
        self._request, self._answer = _Bytes(), _Bytes()
        self._arrived: list[bytes] = []
        self._inner: list[bytes] = []
        self._start: Message | None = None
        self._refusal = False
        self._told = False
        self.changed = False
        """Whether an undeclared middleware was seen to change something."""

    # -- between the client and the middleware

    def receiving(self, receive: Receive) -> Receive:
        """Return the `receive` of the middleware, which notes what arrives."""
        if self._declared:
            return receive

        async def noting() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                self._arrived.append(piece := message.get("body", b""))
                self._request.arrive(piece)
            return message

        return noting

    def answering(self, send: Send) -> Send:
        """Return the `send` of the middleware; the start of an answer waits for its first piece, which shows more."""

        async def stamping(message: Message) -> None:
            if message["type"] == "http.response.start":
                if not self._declared:
                    self._start, self._refusal = message, message["status"] >= _FIRST_REFUSAL
                    return
                message = self._stamped(message, changed=True)
            elif not self._declared and message["type"] == "http.response.body":
                await self._compare(message, send)
            await send(message)

        return stamping

    async def flush(self, send: Send) -> None:
        """Send the start of an answer without any body."""
        if self._start is not None:
            start, self._start = self._start, None
            await send(start)

    async def _compare(self, message: Message, send: Send) -> None:
        start, self._start = self._start, None
        if not self.changed and not self._refusal:
            self._answer.leave(message.get("body", b""), last=not message.get("more_body", False))
            self.changed = self._request.differs or self._answer.differs
        if start is not None:
            self._told = self.changed
            await send(self._stamped(start, changed=self.changed))
        elif self.changed and not self._told:
            raise LateChangeError("changed the answer after its first piece had left and declares nothing")

    def _stamped(self, start: Message, *, changed: bool) -> Message:
        headers = list(start.get("headers", ()))
        names = _names(headers)
        names = [*([self._name] if changed else []), *names, *(name for name in self._inner if name not in names)]
        if not names:
            return start
        kept = [(name, value) for name, value in headers if name.lower() != HEADER]
        return {**start, "headers": [*kept, (HEADER, b",".join(dict.fromkeys(names)))]}

    # -- between the middleware and what it wraps

    def forwarding(self, receive: Receive) -> Receive:
        """Return the `receive` of what the middleware wraps, which notes what the middleware passes on."""
        if self._declared:
            return receive
        request = self._request = _Bytes(piece for piece in self._arrived if piece)

        async def noting() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                request.leave(message.get("body", b""), last=not message.get("more_body", False))
            return message

        return noting

    def returning(self, send: Send) -> Send:
        """Return the `send` of what the middleware wraps, which notes the engine's answer."""
        if not self._answer.left:
            self._answer = _Bytes()

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._inner = _names(message.get("headers", ()))
            elif not self._declared and message["type"] == "http.response.body":
                self._answer.arrive(message.get("body", b""))
            await send(message)

        return noting


def _names(headers: Iterable[tuple[bytes, bytes]]) -> list[bytes]:
    return [part.strip() for name, value in headers if name.lower() == HEADER for part in value.split(b",") if part]
