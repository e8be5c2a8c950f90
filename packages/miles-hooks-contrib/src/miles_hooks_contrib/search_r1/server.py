"""A retrieval server over one corpus, in the form that Search-R1 published."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import socket
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from miles_api.errors import ServiceError
from miles_hooks_contrib.search_r1.retrieval import Query, Reply

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from miles_hooks_contrib.search_r1.bm25 import Bm25

    _Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

__all__ = ["application", "serve"]

_JSON = "application/json"


def application(index: Bm25, topk: int, token: str | None = None) -> web.Application:
    """Return the application: POST `/retrieve`, and GET `/health`, which alone answers without the token."""
    decoder = msgspec.json.Decoder(Query)

    async def retrieve(request: web.Request) -> web.Response:
        try:
            query = decoder.decode(await request.read())
        except (msgspec.DecodeError, RecursionError) as error:
            return _said(400, {"detail": f'expected {{"queries": […], "topk": 3, "return_scores": true}}: {error}'})
        count = topk if query.topk is None else query.topk
        if count < 1:
            return _said(400, {"detail": f"topk is {count}: it is at least 1"})
        found = Reply([await index.search(one, count) for one in query.queries])
        if query.return_scores:
            return _said(200, found)
        return _said(200, {"result": [[hit.document for hit in hits] for hits in found.result]})

    async def health(_request: web.Request) -> web.Response:
        return _said(200, {"status": "ok", "passages": len(index)})

    @web.middleware
    async def guarded(request: web.Request, handler: _Handler) -> web.StreamResponse:
        given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
        if token is None or request.path == "/health" or hmac.compare_digest(given, f"Bearer {token}".encode()):
            return await handler(request)
        return _said(401, {"detail": "the bearer token of this server is missing or wrong"})

    app = web.Application(middlewares=[guarded])
    app.router.add_post("/retrieve", retrieve)
    app.router.add_get("/health", health)
    return app


def _said(status: int, value: object) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type=_JSON)


def serve(index: Bm25, host: str, port: int, topk: int, token: str | None) -> None:
    """Serve until interrupted; says where once it listens. Raises `ServiceError` if it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise ServiceError(f"cannot listen on {host}:{port}: {error.strerror}; choose another --port") from error
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_run(application(index, topk, token), listening))


async def _run(app: web.Application, listening: socket.socket) -> None:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.SockSite(runner, listening).start()
        host, port = listening.getsockname()[:2]
        print(f"serving http://{f'[{host}]' if ':' in host else host}:{port}/retrieve", flush=True)
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
