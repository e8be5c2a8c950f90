"""Real sockets for the router's tests: engines, the router itself and clients, all in the test's own event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import httpx
import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from miles_api.hooks import REGISTRY
from miles_api.loading.bind import bind
from miles_router import RouterOptions
from miles_router.app import RouterApp
from miles_router.fetch import PROBE_AGENT
from miles_router.middleware import MiddlewareStack, args_of
from miles_router.protocol import BoundedProtocol, expire_slow


@contextlib.asynccontextmanager
async def _serve(app, port=0, http="httptools", write_timeout=1800.0):
    quiet = {"log_config": None, "log_level": "critical"}
    config = uvicorn.Config(app, http=http, lifespan="off", proxy_headers=False, **quiet)
    config.load()
    state = ServerState()  # without uvicorn.Server, which takes 0.3 s to stop
    sock = socket.create_server(("127.0.0.1", port), reuse_port=bool(port))
    server = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config=config, server_state=state, app_state={}), sock=sock
    )
    sweep = asyncio.create_task(expire_slow(state.connections, write_timeout)) if http is BoundedProtocol else None
    try:
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
    finally:
        if sweep is not None:
            sweep.cancel()
        server.close()
        for connection in list(state.connections):
            connection.transport.abort()
        tasks = list(state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def _listen(handle):
    tasks = set()

    async def guarded(reader, writer):
        tasks.add(asyncio.current_task())
        try:
            await handle(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Routed:
    """A running router and a client that talks to it."""

    def __init__(self, url, app, client, stack=None):
        self.url = url
        self.app = app
        self.stack = stack
        self.client = client
        self.port = int(url.rpartition(":")[2])

    async def post(self, path="/generate", **kwargs):
        return await self.client.post(path, **kwargs)

    async def workers(self):
        return (await self.client.get("/workers")).json()["workers"]

    async def until(self, condition):
        """Wait until `condition(row)` holds for the first worker; the test's own timeout bounds it."""
        while not condition((await self.workers())[0]):
            await asyncio.sleep(0.01)


def _defaults(middleware):
    kinds = [kind.options for kind in middleware if hasattr(kind, "options")]
    return {name: value for kind in kinds for name, value in msgspec.structs.asdict(kind()).items()}


@contextlib.asynccontextmanager
async def _routed(*urls, middleware=(), brought=None, **options):
    settings = RouterOptions(**{"router_health_interval": 0.05, "router_hang_timeout": 0, **options})
    app = RouterApp(settings)
    await app.start()
    for url in urls:
        app.registry.add(url)
    args = args_of(settings, {**_defaults(middleware), **(brought or {})})
    hooks = [bind(REGISTRY["router_middleware"], f"test:{kind.__name__}", kind, args) for kind in middleware]
    stack = MiddlewareStack(app, settings, hooks) if hooks else None
    try:
        async with (
            _serve(stack or app, http=BoundedProtocol, write_timeout=settings.router_request_timeout) as url,
            httpx.AsyncClient(base_url=url, timeout=20, trust_env=False, verify=False) as client,
        ):
            yield Routed(url, app, client, stack)
    finally:
        await app.close()


@pytest.fixture
def serve():
    """`async with serve(asgi_app, port=0) as url`; `port` may be `held_port`."""
    return _serve


@pytest.fixture
def held_port():
    """A port at which nothing listens but what `serve` is told to; no other process gets it, whenever that ends."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        sock.bind(("127.0.0.1", 0))  # without `listen`, connections are refused
        yield sock.getsockname()[1]


@pytest.fixture
def listen():
    """`async with listen(async_handler_of_streams) as url`, for engines that misbehave below HTTP."""
    return _listen


@pytest.fixture
def routed():
    """`async with routed(*worker_urls, middleware=(), brought={option: value}, **options) as r`."""
    return _routed


class Engine:
    """An ASGI engine that records what it gets and answers with a fixed body."""

    def __init__(self, body=b'{"text": "ok"}', status=200, headers=()):
        self.requests = []
        self.body = body
        self.status = status
        self.headers = list(headers)
        self.health = 200
        self.checks = 0
        """How often it was asked for its health; `questions` is how often whether it hangs."""
        self.questions = 0
        self.weight_version = None
        self.gate = None

    async def __call__(self, scope, receive, send):
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        answer, status = self.body, self.status
        if scope["path"] == "/health":
            self.checks += 1
            answer, status = b"", self.health
        elif scope["path"] == "/server_info" and (b"user-agent", PROBE_AGENT) in scope["headers"]:
            self.questions += 1
        elif scope["path"] == "/model_info":
            answer, status = b'{"model_path": "m", "weight_version": "%s"}' % str(self.weight_version).encode(), 200
        else:
            self.requests.append((scope, body))
            if self.gate is not None:
                await self.gate.wait()
        length = (b"content-length", str(len(answer)).encode())
        await send({"type": "http.response.start", "status": status, "headers": [length, *self.headers]})
        await send({"type": "http.response.body", "body": answer})


@pytest.fixture
def engine():
    """The class of recording engines."""
    return Engine
