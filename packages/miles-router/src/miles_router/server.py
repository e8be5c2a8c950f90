"""One router process: bind, say where, serve until told to stop."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import resource
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import uvicorn
import uvloop

from .app import RouterApp
from .listening import bind
from .messages import Receive, Scope, Send
from .middleware import MiddlewareStack
from .options import READY_PREFIX, RouterOptions, check_binding
from .protocol import BoundedProtocol, expire_slow
from .replay import ReplayApp

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook

__all__ = ["run_router"]

_App = Callable[[Scope, Receive, Send], Awaitable[None]]

_PARENT_POLL_S = 0.5


def run_router(
    options: RouterOptions,
    workers: Iterable[str] = (),
    key: str = "",
    *,
    middleware: Sequence[BoundHook] = (),
    replay: str | None = None,
    parent_pid: int | None = None,
    fd: int | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, or until `parent_pid` is no longer the parent.

    Prints one line, `READY_PREFIX` and the URL, when it accepts requests; warnings go to stderr. `workers` are URLs
    registered from the start, `key` is what they ask for; `middleware` (`resolve_middleware` makes it) wraps the
    router, outermost first; `replay` is a recording to answer from, without engines; `fd` is a listening socket to use
    instead of opening one. Raises `ConfigError` or `ServiceError` if it cannot start.
    """
    check_binding(options)
    _allow_many_connections()
    router = RouterApp(options) if replay is None else ReplayApp(options, replay)
    logging.basicConfig(level=logging.WARNING, format="miles-router: %(message)s")
    sock = bind(options.sglang_router_ip, options.sglang_router_port) if fd is None else socket.socket(fileno=fd)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(router, options, sock, dict.fromkeys(workers, key), middleware, parent_pid))
        except KeyboardInterrupt:
            return


async def _serve(
    router: RouterApp,
    options: RouterOptions,
    sock: socket.socket,
    workers: dict[str, str],
    middleware: Sequence[BoundHook],
    parent_pid: int | None,
) -> None:
    for url, key in workers.items():
        router.registry.add(url, key=key)
    stack = MiddlewareStack(router, options, middleware) if middleware else None
    server = _Server(_uvicorn_config(stack or router, options), _url_of(sock))
    await router.start()
    tasks = [asyncio.create_task(expire_slow(server.server_state.connections, options.router_request_timeout))]
    if parent_pid:
        tasks.append(asyncio.create_task(_stop_without_parent(server, parent_pid)))
    # what exists now lives as long as the process: keep it out of every later collection
    gc.collect()
    gc.freeze()
    try:
        await server.serve(sockets=[sock])
    finally:
        for task in tasks:
            task.cancel()
        if stack is not None:
            await stack.aclose()
        await router.close()


def _uvicorn_config(app: _App, options: RouterOptions) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        interface="asgi3",
        http=BoundedProtocol,
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        date_header=False,
        access_log=False,
        log_config=None,
        log_level="error",
        timeout_graceful_shutdown=options.router_drain_timeout,  # type: ignore[arg-type]
    )


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, url: str) -> None:
        super().__init__(config)
        self._url = url

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        print(READY_PREFIX + self._url, flush=True)


def _allow_many_connections() -> None:
    """Raise the limit of open files as far as it goes: a request takes two, one on each side."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


async def _stop_without_parent(server: uvicorn.Server, parent_pid: int) -> None:
    # PR_SET_PDEATHSIG would fire when the thread that started us ends, long before its process does
    while os.getppid() == parent_pid:
        await asyncio.sleep(_PARENT_POLL_S)
    server.force_exit = True
    server.should_exit = True


def _url_of(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = _outward_address(sock.family, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _outward_address(family: socket.AddressFamily, unspecified: str) -> str:
    """Return the address other machines reach this one at; connecting a UDP socket sends nothing."""
    target, loopback = ("2001:db8::1", "::1") if unspecified == "::" else ("192.0.2.1", "127.0.0.1")
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))
        except OSError:
            return loopback
        return probe.getsockname()[0]
