"""Middleware: what users put around the router, built once, counted, and unable to take the router down.

A middleware is an ASGI application around another one. What it raises becomes a 500 that names it; what comes from
inside it passes through untouched.
"""

from __future__ import annotations

import logging
import time
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError, HookError
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve
from miles_api.loading.hookset import close, report_of

from .options import MIDDLEWARE_HOOK, REPORT_PATH
from .proxy import PREFERRED, Message, Receive, Scope, Send, send_json

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from miles_api.loading.bind import BoundHook

    from .app import RouterApp
    from .options import RouterOptions

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = ["MiddlewareStack", "RouterHandle", "WorkerInfo", "resolve_middleware"]

_log = logging.getLogger("miles_router")


def resolve_middleware(references: Iterable[str]) -> list[BoundHook]:
    """Import and check every middleware; `ConfigError` lists all that do not load or fit."""
    found: list[BoundHook] = []
    problems: list[str] = []
    for reference in references:
        try:
            found.append(resolve(REGISTRY[MIDDLEWARE_HOOK], reference))
        except HookError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


class WorkerInfo(msgspec.Struct, frozen=True):
    """One registered engine, as a middleware sees it."""

    url: str
    healthy: bool
    outstanding: int
    """Requests sent to it that are not answered yet."""
    weight_version: str
    """The version it was registered with; empty means any."""


class RouterHandle:
    """What a middleware is given as `router`: the engines, the options, and a say in who gets a request."""

    def __init__(self, app: RouterApp, options: RouterOptions) -> None:
        self._app = app
        self.options: RouterOptions = msgspec.structs.replace(options, router_token=None)
        """The router's options, without the token."""

    @property
    def workers(self) -> list[WorkerInfo]:
        """The registered engines as they are now, in order of registration."""
        return [WorkerInfo(w.url, w.healthy, w.outstanding, w.weight_version) for w in self._app.registry]

    def prefer(self, scope: Scope, url: str) -> None:
        """Send this request to the engine at `url` while it is healthy; otherwise the policy picks, as without."""
        scope[PREFERRED] = url


class MiddlewareStack:
    """The router within its middleware, outermost first; build it in the event loop that serves it.

    Requests that the router itself refuses at the door (no token, a web page) reach no middleware, nor do `/health`
    and `/hooks`: whoever asks for those asks about this process.
    """

    def __init__(self, router: RouterApp, options: RouterOptions, hooks: Sequence[BoundHook]) -> None:
        """Build every middleware. What a constructor raises is the user's own exception, with a note naming it."""
        self._router = router
        self._hooks = list(hooks)
        self._instances: list[Any] = []
        handle = RouterHandle(router, options)
        app: App = router
        for hook in reversed(self._hooks):
            app = _Guarded(hook, app, handle)
            self._instances.append(app.instance)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request through all middleware."""
        path = scope["path"]
        if path == "/health":
            await self._router(scope, receive, send)
        elif (refusal := self._router.refusal(scope["headers"])) is not None:
            await self._router.refuse(send, *refusal)
        elif path == REPORT_PATH:
            await send_json(send, 200, {"hooks": self.report()})
        else:
            await self._app(scope, receive, send)

    def report(self) -> list[dict[str, Any]]:
        """Say what this process loaded, from which file, and how it fared: one dict a middleware, outermost first."""
        return [
            {**report_of(hook), "changes_tokens": bool(getattr(hook.target, "changes_tokens", False))}
            for hook in self._hooks
        ]

    async def aclose(self) -> None:
        """Close every middleware that has `aclose()` or `close()`, outermost first."""
        for instance in reversed(self._instances):
            await close(instance)


class _Call:
    """What happened inside a middleware during one request."""

    __slots__ = ("answered", "entered", "error", "seconds")

    def __init__(self) -> None:
        self.answered = False
        self.entered = False
        self.error: Exception | None = None
        self.seconds = 0.0


class _Guarded:
    """One middleware between its neighbours: its own time and errors are told apart from those of what it wraps."""

    def __init__(self, hook: BoundHook, app: App, handle: RouterHandle) -> None:
        self._stats = hook.stats
        self._name = f"router middleware {hook.reference}"
        self._app = app
        # Not on the scope: a middleware may pass on one of its own making.
        self._current: ContextVar[_Call] = ContextVar(hook.reference)
        self.instance = hook(self._inside, router=handle)
        # Requests are counted, not the construction.
        self._stats.calls, self._stats.seconds = 0, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        call = _Call()
        token = self._current.set(call)

        async def noting(message: Message) -> None:
            call.answered = True
            await send(message)

        self._stats.calls += 1
        started = time.perf_counter()
        problem = ""
        try:
            await self.instance(scope, receive, noting)
            if not call.answered and not call.entered:
                problem = "neither answered nor passed the request on"
                self._tell(problem)
        except Exception as error:
            if error is call.error:
                raise
            problem = f"raised {type(error).__name__}: {error}"
            self._tell(problem, error)
            # A begun answer can only be cut off, which the server does.
            if call.answered:
                raise
        finally:
            self._current.reset(token)
            self._stats.seconds += time.perf_counter() - started - call.seconds
        if problem:
            detail = {"message": f"{self._name} {problem}", "type": "middleware", "code": 500}
            await send_json(send, 500, {"error": detail})

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A task of the middleware's own serves no request in particular.
        call = self._current.get(None) or _Call()
        call.entered = True
        started = time.perf_counter()
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            call.error = error
            raise
        finally:
            call.seconds += time.perf_counter() - started

    def _tell(self, problem: str, error: Exception | None = None) -> None:
        """Count an error and log its traceback, ever more rarely: a middleware that always raises fills no disk."""
        self._stats.errors += 1
        if self._stats.errors.bit_count() == 1:
            _log.error("%s %s (%d so far)", self._name, problem, self._stats.errors, exc_info=error)
