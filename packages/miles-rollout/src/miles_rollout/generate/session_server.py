"""The address at which agents find their sessions: OpenAI's protocol on loopback, inside the rollout process."""

from __future__ import annotations

import asyncio
import contextlib
import socket
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
# OpenAI's clients would repeat a request that was answered 409 or 5xx, and it would be answered as before.
_FINAL = {"x-should-retry": "false"}


class SessionServer:
    """Serves sessions under `http://127.0.0.1:PORT/sessions/<id>/v1`, in one event loop; starts with the first one.

    The id is the key: it is long, random and known to the session's agent alone.
    """

    def __init__(self) -> None:
        self._sessions: dict[str, Session] = {}
        self._runner: web.AppRunner | None = None
        self._socket: socket.socket | None = None
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

    def abandon(self) -> None:
        """Let go of the port after the event loop was closed: nobody may wait there for an answer."""
        if self._socket is not None:
            self._socket.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=_MAX_BODY)
        app.router.add_post("/sessions/{id}/v1/chat/completions", self._complete)
        app.router.add_get("/sessions/{id}/v1/models", self._models)
        app.router.add_route("*", "/sessions/{id}/{rest:.*}", self._nothing)
        # A client that hangs up cancels its request: an answer that nobody heard is no part of the conversation.
        runner = web.AppRunner(
            app, handle_signals=False, access_log=None, shutdown_timeout=_SHUTDOWN_S, handler_cancellation=True
        )
        await runner.setup()
        self._socket = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, self._socket).start()
        host, port = runner.addresses[0][:2]
        self._runner, self._url = runner, f"http://{host}:{port}"

    async def _complete(self, request: web.Request) -> web.Response:
        try:
            session = self._session(request)
            chat, reply = await session.complete(await _body(request))
        except RequestError as error:
            return _refusal(error)
        if chat.stream:
            return web.Response(body=as_stream(reply), content_type="text/event-stream")
        return _json(200, reply)

    async def _models(self, request: web.Request) -> web.Response:
        try:
            return _json(200, self._session(request).models())
        except RequestError as error:
            return _refusal(error)

    async def _nothing(self, request: web.Request) -> web.Response:
        what = f"{request.method} {request.match_info['rest']}"
        return _refusal(RequestError(404, "not_found", f"{what}: only chat completions and models"))

    def _session(self, request: web.Request) -> Session:
        session = self._sessions.get(request.match_info["id"])
        if session is None:
            raise RequestError(404, "no_session", "there is no such session: it has ended, or the address is wrong")
        return session


async def _body(request: web.Request) -> bytes:
    try:
        return await request.read()
    except web.HTTPRequestEntityTooLarge as error:
        raise RequestError(413, "too_large", f"the body is larger than {_MAX_BODY >> 20} MiB") from error


def _refusal(error: RequestError) -> web.Response:
    return _json(error.status, error_body(error), _FINAL)


def _json(status: int, value: object, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        status=status, body=msgspec.json.encode(value), content_type="application/json", headers=headers
    )
