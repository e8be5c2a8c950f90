"""The ASGI messages that the router's own parts read and send."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from .memory import BodyMemory

__all__ = [
    "BODIES",
    "CHOSEN",
    "PREFERRED",
    "RETRY_AFTER",
    "BodyTooLargeError",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "read_body",
    "send_bytes",
    "send_json",
    "until_gone",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

RETRY_AFTER = (b"retry-after", b"1")
BODIES = "miles.bodies"
"""Where middleware finds the `BodyMemory` for a body that it reads."""
PREFERRED = "miles.worker"
"""Where a request's scope names the engine that middleware would like for it."""
CHOSEN = "miles.workers"
"""Where it names the only engines that middleware lets it go to, as a frozenset of URLs."""


class BodyTooLargeError(Exception):
    """A request body exceeds the limit; nothing was sent to any engine, nor back."""


async def read_body(receive: Receive, limit: int, memory: BodyMemory | None = None) -> bytes | None:
    """Return the whole request body, or None if the client left before sending all of it.

    What is returned is counted in `memory`, for the caller to give back. Raises `BodyTooLargeError` as soon as there
    are more than `limit` bytes, and what `memory` raises.
    """
    parts: list[bytes] = []
    size, whole = 0, False
    try:
        while (message := await receive())["type"] == "http.request":
            part = message.get("body", b"")
            if size + len(part) > limit:
                raise BodyTooLargeError
            if memory is not None:
                memory.take(len(part))
            size += len(part)
            if not message.get("more_body", False):
                whole = True
                return b"".join((*parts, part)) if parts else part
            parts.append(part)
        return None
    finally:
        if memory is not None and not whole:
            memory.give(size)


async def send_bytes(send: Send, status: int, body: bytes, kind: bytes, *extra: tuple[bytes, bytes]) -> None:
    """Answer with a body of the content type `kind` and extra headers."""
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode()), *extra]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def send_json(send: Send, status: int, value: object, *extra: tuple[bytes, bytes]) -> None:
    """Answer with a JSON value and extra headers."""
    await send_bytes(send, status, msgspec.json.encode(value), b"application/json", *extra)


async def until_gone(receive: Receive) -> None:
    """Return when the client has left; its body has to be read already."""
    while (await receive())["type"] != "http.disconnect":
        pass
