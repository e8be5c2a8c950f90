"""The router as a plain ASGI application: a handful of management endpoints, everything else is proxied.

The endpoints answer to the names of both generations of SGLang's router (`/add_worker?url=`, `/workers`), so that
launch scripts written for either keep working.
"""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote

import msgspec

from miles_api.errors import ConfigError

from .health import HealthProber
from .policies import make_policy
from .proxy import RETRY_AFTER_S, Proxy, Receive, Scope, Send, read_body, send_json
from .workers import WorkerRegistry

if TYPE_CHECKING:
    from .options import RouterOptions

__all__ = ["RouterApp"]


class _Call(NamedTuple):
    path: str
    query: bytes
    body: bytes


_Handler = Callable[[_Call], tuple[int, object]]


class _NewWorker(msgspec.Struct):
    """The body of `POST /workers`; SGLang's launchers send more keys than we need."""

    url: str
    weight_version: str = ""


class RouterApp:
    """The ASGI application. `start` and `close` run its background tasks, in the loop that serves it."""

    def __init__(self, options: RouterOptions) -> None:
        self._prober = HealthProber(options.router_health_interval)
        self.registry = WorkerRegistry(lambda worker: self._prober.watch(self.registry, worker))
        self._proxy = Proxy(self.registry, make_policy(options.router_policy), options.router_request_timeout)
        self._token = options.router_token
        self._background: asyncio.Task[None] | None = None
        self._routes: dict[str, dict[str, _Handler]] = {
            "/add_worker": {"POST": self._add_by_query},
            "/remove_worker": {"POST": self._remove_by_query},
            "/list_workers": {"GET": self._list_urls},
            "/workers": {"GET": self._list_workers, "POST": self._add_by_body},
        }
        self._delete_route: dict[str, _Handler] = {"DELETE": self._remove_by_path}

    async def start(self) -> None:
        """Start the background tasks."""
        self._background = asyncio.get_running_loop().create_task(self._proxy.expire_silent())

    async def close(self) -> None:
        """Stop the background tasks and close idle connections."""
        if self._background is not None:
            self._background.cancel()
        await self._prober.close()
        for worker in self.registry:
            worker.pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, or forward it."""
        path = scope["path"]
        methods = self._routes.get(path)
        if methods is None and path.startswith("/workers/"):
            methods = self._delete_route
        if methods is not None:
            await self._manage(methods, scope, receive, send)
        elif path == "/health":
            await self._health(send)
        else:
            await self._proxy(scope, receive, send)

    async def _manage(self, methods: dict[str, _Handler], scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if self._token is not None and not _bears(headers.get(b"authorization", b""), self._token):
            await _refuse(send, 401, "this endpoint needs `Authorization: Bearer <--router-token>`")
            return
        if b"origin" in headers:
            # a web page could otherwise make a browser on this machine register an engine of the page's choice
            await _refuse(send, 403, "this endpoint is not for browsers")
            return
        handler = methods.get(scope["method"])
        if handler is None:
            allow = (b"allow", ", ".join(methods).encode())
            await _refuse(send, 405, f"{scope['path']} takes {', '.join(methods)}", allow)
            return
        body = await read_body(receive)
        if body is None:
            return
        try:
            status, value = handler(_Call(scope["path"], scope["query_string"], body))
        except (ConfigError, msgspec.DecodeError) as exc:
            await _refuse(send, 400, str(exc))
            return
        await send_json(send, status, value)

    async def _health(self, send: Send) -> None:
        healthy, registered = len(self.registry.healthy), len(self.registry)
        state = "healthy" if healthy else "unhealthy" if registered else "no_workers"
        value = {"status": state, "workers": registered, "healthy": healthy}
        if state == "unhealthy":
            await send_json(send, 503, value, (b"retry-after", str(RETRY_AFTER_S).encode()))
        else:
            await send_json(send, 200, value)

    def _add(self, url: str, weight_version: str) -> tuple[int, object]:
        worker = self.registry.add(url, weight_version)
        return 200, {"status": "success", "url": worker.url, "worker_id": worker.id}

    def _add_by_query(self, call: _Call) -> tuple[int, object]:
        return self._add(_query_url(call), "")

    def _add_by_body(self, call: _Call) -> tuple[int, object]:
        new = msgspec.json.decode(call.body, type=_NewWorker)
        return self._add(new.url, new.weight_version)

    def _remove(self, key: str) -> tuple[int, object]:
        worker = self.registry.remove(key)
        if worker is None:
            message = f"no worker {key}; registered: {', '.join(w.url for w in self.registry) or 'none'}"
            return 404, {"error": {"message": message, "type": "unknown_worker", "code": 404}}
        return 200, {"status": "success", "url": worker.url}

    def _remove_by_query(self, call: _Call) -> tuple[int, object]:
        return self._remove(_query_url(call))

    def _remove_by_path(self, call: _Call) -> tuple[int, object]:
        return self._remove(unquote(call.path.removeprefix("/workers/")))

    def _list_urls(self, _call: _Call) -> tuple[int, object]:
        return 200, {"urls": [worker.url for worker in self.registry]}

    def _list_workers(self, _call: _Call) -> tuple[int, object]:
        return 200, {"workers": [worker.describe() for worker in self.registry]}


def _bears(authorization: bytes, token: str) -> bool:
    scheme, _, given = authorization.partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), token.encode())


def _query_url(call: _Call) -> str:
    urls = parse_qs(call.query.decode("latin-1")).get("url", [])
    if len(urls) != 1:
        raise ConfigError(f"{call.path} needs exactly one ?url=http://host:port")
    return urls[0]


async def _refuse(send: Send, status: int, message: str, *extra: tuple[bytes, bytes]) -> None:
    await send_json(send, status, {"error": {"message": message, "type": "refused", "code": status}}, *extra)
