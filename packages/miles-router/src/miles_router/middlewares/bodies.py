"""What middleware that reads whole request bodies shares."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from miles_router.messages import BODIES, RETRY_AFTER, BodyTooLargeError, read_body, send_json
from miles_router.routing import Refusal

if TYPE_CHECKING:
    from miles_router.memory import BodyMemory
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["WholeAnswer", "generate_body", "giving", "question", "with_own_body"]

_TOO_LONG = 413
_ABOUT_BODY = frozenset((b"content-length", b"content-encoding", b"transfer-encoding", b"expect", b"accept-encoding"))


async def generate_body(app: App, scope: Scope, receive: Receive, send: Send, limit: int) -> bytes | None:
    """Return the body of a POST to `/generate`; None where nothing is left to do.

    That is with any other request, which `app` has served, where the body is too long or there is no room for it, which
    was answered, or where the client has left, which `app` was told.
    """
    if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/generate":
        await app(scope, receive, send)
        return None
    memory: BodyMemory | None = scope.get(BODIES)
    try:
        body = await read_body(receive, limit, memory)
    except Refusal as refusal:
        await send_json(send, refusal.status, {"error": refusal.detail}, RETRY_AFTER)
        return None
    except BodyTooLargeError:
        text = f"the body is longer than --router-max-body-bytes {limit}"
        await send_json(send, _TOO_LONG, {"error": {"message": text, "type": "refused", "code": _TOO_LONG}})
        return None
    if body is None:
        await app(scope, _left, send)
    elif memory is not None:
        memory.give(len(body))  # who forwards it counts it again
    return body


def giving(body: bytes, then: Receive | None = None) -> Receive:
    """Return a `receive` that gives a body, and then what else comes; without `then` nobody ever leaves."""
    given = False

    async def receive() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await _never() if then is None else await then()

    return receive


def with_own_body(scope: Scope) -> Scope:
    """Return the scope for another body than the client sent, and for an answer that is read here."""
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _ABOUT_BODY]}


def question(scope: Scope, method: str, path: str) -> Scope:
    """Return the scope of a question that middleware asks an engine in the course of a request."""
    target = {"method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    return {**with_own_body(scope), **target}


class WholeAnswer:
    """An answer that is held until it is over."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []
        self.status = 0
        """0 while none has come, and for ever where the client left."""
        self.complete = False
        """Whether all of it came: an engine may die in the middle of it."""

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def take(self, message: Message) -> None:
        """Hold one message; the `send` of what answers."""
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], list(message.get("headers", ()))
        else:
            self._parts.append(message.get("body", b""))
            self.complete = not message.get("more_body", False)

    async def give(self, send: Send) -> None:
        """Pass on what there is, which is as unfinished as it came: the server then cuts the client off."""
        if not self.status:
            return
        await send({"type": "http.response.start", "status": self.status, "headers": self.headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": not self.complete})

    def replace(self, body: bytes) -> None:
        """Give the answer another body."""
        kept = [pair for pair in self.headers if pair[0].lower() != b"content-length"]
        self.headers, self._parts = [*kept, (b"content-length", str(len(body)).encode())], [body]


async def _left() -> Message:
    return {"type": "http.disconnect"}


async def _never() -> Message:
    return await asyncio.get_running_loop().create_future()
