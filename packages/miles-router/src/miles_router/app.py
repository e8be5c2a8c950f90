"""The router as a plain ASGI application: a handful of management endpoints, inference is proxied, the rest is 404.

The endpoints answer to the names of both generations of SGLang's router (`/add_worker?url=`, `/workers`), so that
launch scripts written for either keep working.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import parse_qs, unquote

import msgspec

from miles_api.errors import ConfigError

from .aborting import abort
from .access import allowed_methods, bears, comes_from_a_web_page, names_this_machine
from .aggregate import AGGREGATED
from .choosing import looks_at_requests, make_policy
from .gate import make_gate
from .health import HealthProber
from .known_heads import KnownAnswers, KnownRequests
from .lane import Lane
from .memory import BodyMemory
from .messages import RETRY_AFTER, BodyTooLargeError, Receive, Scope, Send, read_body, send_bytes, send_json
from .metrics import Metrics, describe, exposition
from .page import PAGE_HEADERS, page
from .proxy import Proxy, generates
from .routing import WEIGHT_VERSION, Route
from .workers import WorkerRegistry

if TYPE_CHECKING:
    from .options import RouterOptions
    from .policies import Policy
    from .workers import Worker

__all__ = ["RouterApp"]


_SHOWN = frozenset(("/status", "/metrics"))
_MAX_MANAGED = 64 << 10
"""Bytes of a body that is for the router itself, where nothing counts what all of them take together."""


class _Call(NamedTuple):
    path: str
    query: bytes
    body: bytes


_Answer = tuple[int, object]
_Handler = Callable[[_Call], _Answer | Awaitable[_Answer]]


class _NewWorker(msgspec.Struct):
    """The body of `POST /workers`; SGLang's launchers send more keys than we need."""

    url: str
    weight_version: str = ""
    api_key: str | None = None
    """What the engine asks for; every request to it brings it, and nobody else is told."""


class _Weights(msgspec.Struct):
    """The body of `POST /weight_version`."""

    weight_version: str


class RouterApp:
    """The ASGI application. `start` and `close` run its background tasks, in the loop that serves it."""

    def __init__(self, options: RouterOptions) -> None:
        self._prober = HealthProber(options.router_health_interval, options.router_hang_timeout)
        self.registry = WorkerRegistry(self._on_quarantine, self._on_doubt)
        self.metrics = Metrics()
        self._token = None if options.router_token is None else options.router_token.encode()
        self._timeout = options.router_request_timeout
        self._max_body = min(options.router_max_body_bytes, options.router_max_body_memory)
        self.bodies = BodyMemory(options.router_max_body_memory)
        policy = make_policy(options.router_policy, self.registry)
        self._gate = make_gate(options, self.registry, policy)
        if self._gate is not None:
            self.registry.on_change = self._gate.pump
        self._proxy = Proxy(
            self.registry,
            policy,
            gate=self._gate,
            metrics=self.metrics,
            max_body=self._max_body,
            bodies=self.bodies,
        )
        looks = looks_at_requests(options.router_policy)
        self.lane = None if self._gate is not None else self._make_lane(policy, looks)
        """What requests share that go the short way; None where limits send all of them the long way."""
        self._background: list[asyncio.Task[None]] = []
        self._routes: dict[str, dict[str, _Handler]] = {
            "/add_worker": {"POST": self._add_by_query},
            "/remove_worker": {"POST": self._remove_by_query},
            "/list_workers": {"GET": self._list_urls},
            "/workers": {"GET": self._list_workers, "POST": self._add_by_body},
            "/weight_version": {"GET": self._weights, "POST": self._require_weights},
            "/abort_request": {"POST": self._abort},
            "/status": {"GET": self._status},
        }
        self._delete_route: dict[str, _Handler] = {"DELETE": self._remove_by_path}

    def _make_lane(self, policy: Policy, looks: bool) -> Lane:
        return Lane(
            self.registry,
            policy,
            looks,
            self.metrics,
            self._proxy.exchanges,
            KnownRequests(self._goes_short, generates),
            KnownAnswers(),
            self.bodies,
            self._max_body,
        )

    def _goes_short(self, path: str, headers: list[tuple[bytes, bytes]]) -> bool:
        """Tell whether a POST needs nothing but any engine's answer."""
        versioned = any(name == WEIGHT_VERSION for name, _ in headers)
        return "POST" in allowed_methods(path) and not versioned and self.refusal(headers) is None

    async def start(self) -> None:
        """Start the background tasks."""
        loop = asyncio.get_running_loop()
        silence = self._prober.watch_silence(self.registry, self._proxy.exchanges)
        self._background = [
            loop.create_task(self._proxy.exchanges.expire_silent(self._timeout)),
            loop.create_task(silence),
        ]

    async def close(self) -> None:
        """Stop the background tasks and close idle connections."""
        for task in self._background:
            task.cancel()
        await self._prober.close()
        for worker in self.registry:
            worker.pool.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request, or forward it."""
        path = scope["path"]
        if path == "/health":
            await self._health(send)
            return
        if path == "/":
            await self.front_page(scope, send)
            return
        if (refusal := self.refusal(scope["headers"])) is not None:
            await self.refuse(send, *refusal)
            return
        try:
            await self._admit(path, scope, receive, send)
        except BodyTooLargeError:
            await self.refuse(send, 413, f"the body is longer than --router-max-body-bytes {self._max_body}")

    def refusal(self, headers: Iterable[tuple[bytes, bytes]]) -> tuple[int, str] | None:
        """Return status and reason for a request that is not let in: it lacks the token, or a web page sent it."""
        if self._token is not None and not bears(headers, self._token):
            return 401, "the router needs `Authorization: Bearer <--router-token>`"
        if comes_from_a_web_page(headers):
            return 403, "the router is not for browsers"
        return None

    async def refuse(self, send: Send, status: int, message: str, *extra: tuple[bytes, bytes]) -> None:
        """Answer with an error in the router's form."""
        await send_json(send, status, {"error": {"message": message, "type": "refused", "code": status}}, *extra)

    async def _admit(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        allowed = allowed_methods(path)
        if scope["method"] in allowed:
            asked = Route(scope, b"").candidates(self.registry) if path in AGGREGATED else []
            # What one engine says goes as it is, unless any may tell its key.
            if path in AGGREGATED and scope["method"] == "GET" and (len(asked) > 1 or self.registry.any_key):
                await send_json(send, *await AGGREGATED[path](asked, path))
            else:
                await self._proxy(scope, receive, send)
        elif allowed:
            await self._refuse_method(send, path, allowed)
        elif path in _SHOWN and self._token is None and not names_this_machine(scope["headers"]):
            await self.refuse(send, 403, "without a token the router is to be asked by its address or as localhost")
        elif path == "/metrics" and scope["method"] == "GET":
            text = exposition(self.metrics, self.registry, self._queued()).encode()
            await send_bytes(send, 200, text, b"text/plain; version=0.0.4; charset=utf-8")
        elif (routes := self._routes.get(path)) is not None:
            await self._manage(routes, scope, receive, send)
        elif path.startswith("/workers/"):
            await self._manage(self._delete_route, scope, receive, send)
        else:
            text = f"the router does not forward {path}: control endpoints are called on the engines directly"
            await self.refuse(send, 404, text)

    async def _manage(self, methods: dict[str, _Handler], scope: Scope, receive: Receive, send: Send) -> None:
        handler = methods.get(scope["method"])
        if handler is None:
            await self._refuse_method(send, scope["path"], methods)
            return
        try:
            body = await read_body(receive, min(self._max_body, _MAX_MANAGED))
        except BodyTooLargeError:
            text = f"the body is longer than {_MAX_MANAGED} bytes, or --router-max-body-bytes {self._max_body}"
            await self.refuse(send, 413, text)
            return
        if body is None:
            return
        try:
            answer = handler(_Call(scope["path"], scope["query_string"], body))
            status, value = answer if isinstance(answer, tuple) else await answer
        except (ConfigError, msgspec.DecodeError) as exc:
            await self.refuse(send, 400, str(exc))
            return
        await send_json(send, status, value)

    async def _refuse_method(self, send: Send, path: str, methods: Iterable[str]) -> None:
        taken = ", ".join(methods)
        await self.refuse(send, 405, f"{path} takes {taken}", (b"allow", taken.encode()))

    async def _health(self, send: Send) -> None:
        healthy, registered = len(self.registry.healthy), len(self.registry)
        state = "healthy" if healthy else "unhealthy" if registered else "no_workers"
        value = {"status": state, "workers": registered, "healthy": healthy}
        if state == "unhealthy":
            await send_json(send, 503, value, RETRY_AFTER)
        else:
            await send_json(send, 200, value)

    async def front_page(self, scope: Scope, send: Send) -> None:
        """Answer `/`: the page is the same for everybody; what it shows it has to ask for, with the token."""
        if scope["method"] not in ("GET", "HEAD"):
            await self._refuse_method(send, "/", ("GET", "HEAD"))
        else:
            await send_bytes(send, 200, page(), b"text/html; charset=utf-8", *PAGE_HEADERS)

    def _on_quarantine(self, worker: Worker) -> None:
        self._prober.watch(self.registry, worker)

    def _on_doubt(self, worker: Worker) -> None:
        self._prober.question(self.registry, worker)

    def _queued(self) -> int:
        return 0 if self._gate is None else len(self._gate)

    def _status(self, _call: _Call) -> _Answer:
        return 200, describe(self.metrics, self.registry, self._queued())

    def _add(self, url: str, weight_version: str, key: str = "") -> _Answer:
        worker = self.registry.add(url, weight_version, key)
        return 200, {"status": "success", "url": worker.url, "worker_id": worker.id}

    def _add_by_query(self, call: _Call) -> _Answer:
        return self._add(_query_url(call), "")

    def _add_by_body(self, call: _Call) -> _Answer:
        new = msgspec.json.decode(call.body, type=_NewWorker)
        return self._add(new.url, new.weight_version, new.api_key or "")

    def _remove(self, key: str) -> _Answer:
        worker = self.registry.remove(key)
        if worker is None:
            message = f"no worker {key}; registered: {', '.join(w.url for w in self.registry) or 'none'}"
            return 404, {"error": {"message": message, "type": "unknown_worker", "code": 404}}
        return 200, {"status": "success", "url": worker.url}

    def _remove_by_query(self, call: _Call) -> _Answer:
        return self._remove(_query_url(call))

    def _remove_by_path(self, call: _Call) -> _Answer:
        return self._remove(unquote(call.path.removeprefix("/workers/")))

    def _weights(self, _call: _Call) -> _Answer:
        return 200, {"weight_version": self.registry.required}

    async def _require_weights(self, call: _Call) -> _Answer:
        wanted = msgspec.json.decode(call.body, type=_Weights).weight_version
        await self._prober.require_weights(self.registry, wanted)
        held = [{"url": worker.url, "reason": worker.reason} for worker in self.registry if not worker.healthy]
        return 200, {"status": "success", "weight_version": wanted, "held_back": held}

    async def _abort(self, call: _Call) -> _Answer:
        return await abort(list(self.registry), call.body)

    def _list_urls(self, _call: _Call) -> _Answer:
        return 200, {"urls": [worker.url for worker in self.registry]}

    def _list_workers(self, _call: _Call) -> _Answer:
        return 200, {"workers": [worker.describe() for worker in self.registry]}


def _query_url(call: _Call) -> str:
    urls = parse_qs(call.query.decode("latin-1")).get("url", [])
    if len(urls) != 1:
        raise ConfigError(f"{call.path} needs exactly one ?url=http://host:port")
    return urls[0]
