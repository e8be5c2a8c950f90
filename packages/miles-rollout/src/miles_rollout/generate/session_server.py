"""The address at which agents find their sessions: OpenAI's protocol on loopback, inside the rollout process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from miles_rollout.generate.chat_api import RequestError, as_stream, error_body

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from miles_rollout.generate.session import Session

__all__ = ["SessionServer"]

_MAX_BODY = 64 << 20
_SHUTDOWN_S = 1.0


class SessionServer:
    """Serves sessions under `http://127.0.0.1:PORT/sessions/<id>/v1`; starts with the first one.

    The id is the key: it is long, random and known to the session's agent alone.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._url = ""

    @contextlib.asynccontextmanager
    async def serving(self, session: Session) -> AsyncIterator[str]:
        """Yield the session's `base_url`; afterwards nothing answers there any more."""
        async with self._starting:
            if self._runner is None:
                await self._start()
        self._sessions[session.id] = session
        try:
            yield f"{self._url}/sessions/{session.id}/v1"
        finally:
            del self._sessions[session.id]
            session.close("its agent has returned or was cancelled")

    async def aclose(self) -> None:
        """Stop serving."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _start(self) -> None:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/sessions/{id}/v1/chat/completions", self._complete)
        app.router.add_route("*", "/sessions/{id}/{rest:.*}", self._nothing)
        runner = web.AppRunner(app, handle_signals=False, access_log=None, shutdown_timeout=_SHUTDOWN_S)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        host, port = runner.addresses[0][:2]
        self._runner, self._url = runner, f"http://{host}:{port}"

    async def _complete(self, request: web.Request) -> web.Response:
        session = self._sessions.get(request.match_info["id"])
        try:
            if session is None:
                raise RequestError(404, "no_session", "there is no such session: it has ended, or the address is wrong")
            chat, reply = await session.complete(await request.read())
        except RequestError as error:
            return _json(error.status, error_body(error))
        if chat.stream:
            return web.Response(body=as_stream(reply), content_type="text/event-stream")
        return _json(200, reply)

    async def _nothing(self, request: web.Request) -> web.Response:
        error = RequestError(404, "not_found", f"{request.method} {request.match_info['rest']}: only chat completions")
        return _json(error.status, error_body(error))


def _json(status: int, value: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")
