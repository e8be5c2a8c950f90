"""What middleware that reads whole request bodies shares."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from miles_router.messages import BodyTooLargeError, read_body, send_json

if TYPE_CHECKING:
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["giving", "whole_body"]

_TOO_LONG = 413


async def whole_body(app: App, scope: Scope, receive: Receive, send: Send, limit: int) -> bytes | None:
    """Return a request's body; None where nothing is left to do.

    That is where it is too long, which was answered, or where the client has left, which `app` was told.
    """
    try:
        body = await read_body(receive, limit)
    except BodyTooLargeError:
        text = f"the body is longer than --router-max-body-bytes {limit}"
        await send_json(send, _TOO_LONG, {"error": {"message": text, "type": "refused", "code": _TOO_LONG}})
        return None
    if body is None:
        await app(scope, _left, send)
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


async def _left() -> Message:
    return {"type": "http.disconnect"}


async def _never() -> Message:
    return await asyncio.get_running_loop().create_future()
