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

from miles_api.args import Args
from miles_api.errors import ConfigError, HookError
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve
from miles_api.loading.hookset import close, report_of

from .access import allowed_methods
from .handle import RouterHandle, WorkerInfo
from .messages import BODIES, Message, Receive, Scope, Send, send_json
from .options import MIDDLEWARE_HOOK, REPORT_PATH
from .stamps import Passage, stamp_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

    from miles_api.loading.bind import BoundHook

    from .app import RouterApp
    from .options import RouterOptions

    App = Callable[[Scope, Receive, Send], Awaitable[None]]

__all__ = ["MiddlewareStack", "RouterHandle", "WorkerInfo", "args_of", "resolve_middleware"]

_log = logging.getLogger("miles_router")


def resolve_middleware(references: Iterable[str], args: Args | None = None) -> list[BoundHook]:
    """Import and check every middleware; `ConfigError` lists all that do not load or fit.

    Each gets its own view of `args` as `router.args`; without, it finds the router's options there.
    """
    found: list[BoundHook] = []
    problems: list[str] = []
    for reference in references:
        try:
            found.append(resolve(REGISTRY[MIDDLEWARE_HOOK], reference, None if args is None else args.fork()))
        except HookError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
    return found


class MiddlewareStack:
    """The router within its middleware, outermost first; build it in the event loop that serves it.

    Requests that the router itself refuses at the door (no token, a web page) reach no middleware, nor do `/`,
    `/health` and `/hooks`: whoever asks for those asks about this process; nor does what registers an engine, which
    has its key.
    """

    def __init__(self, router: RouterApp, options: RouterOptions, hooks: Sequence[BoundHook]) -> None:
        """Build every middleware. What a constructor raises is the user's own exception, with a note naming it."""
        self._router = router
        self._hooks = list(hooks)
        self._guards: list[_Guarded] = []
        app: App = router
        for hook in reversed(self._hooks):
            app = _Guarded(hook, app, RouterHandle(router, options, hook.view or args_of(options, {})))
            self._guards.insert(0, app)
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one HTTP request through all middleware."""
        path = scope["path"]
        if path in ("/", "/health"):
            await self._router(scope, receive, send)
        elif (refusal := self._router.refusal(scope["headers"])) is not None:
            await self._router.refuse(send, *refusal)
        elif path == "/workers" and scope["method"] == "POST":
            await self._router(scope, receive, send)
        elif path == REPORT_PATH:
            await send_json(send, 200, {"hooks": self.report()})
        else:
            scope[BODIES] = self._router.bodies
            await self._app(scope, receive, send)

    def report(self) -> list[dict[str, Any]]:
        """Say what this process loaded, from which file, and how it fared: one dict a middleware, outermost first.

        `changed_bodies` counts the requests whose bytes an undeclared middleware changed; `counts` is what a
        middleware's own `counts()` says.
        """
        return [guard.report() for guard in self._guards]

    async def aclose(self) -> None:
        """Close every middleware that has `aclose()` or `close()`, outermost first."""
        for guard in self._guards:
            await close(guard.instance)


def args_of(options: RouterOptions, brought: Mapping[str, Any]) -> Args:
    """Return what middleware gets as `router.args`: the router's options without the token, and what it brings."""
    return Args({**msgspec.structs.asdict(options), "router_token": None, **brought})


class _Call:
    """What happened inside a middleware during one request."""

    __slots__ = ("answered", "entered", "error", "passage", "seconds")

    def __init__(self, passage: Passage | None = None) -> None:
        self.passage = passage
        self.answered = False
        self.entered = False
        self.error: Exception | None = None
        self.seconds = 0.0


class _Guarded:
    """One middleware between its neighbours: its own time and errors are told apart from those of what it wraps."""

    def __init__(self, hook: BoundHook, app: App, handle: RouterHandle) -> None:
        self._hook = hook
        self._stats = hook.stats
        self._declares: bool | None = getattr(hook.target, "changes_tokens", None)
        self._stamp = stamp_of(hook.reference)
        self._changed = 0
        self._name = f"router middleware {hook.reference}"
        self._app = app
        # Not on the scope: a middleware may pass on one of its own making.
        self._current: ContextVar[_Call] = ContextVar(hook.reference)
        self.instance = hook(self._inside, router=handle)
        # Requests are counted, not the construction.
        self._stats.calls, self._stats.seconds = 0, 0.0

    def report(self) -> dict[str, Any]:
        counts = self._counts()
        own = {"changes_tokens": bool(self._declares), "changed_bodies": self._changed, "counts": counts}
        return {**report_of(self._hook), **own}

    def _counts(self) -> dict[str, Any]:
        """Return what the middleware says of itself; nothing where that fails, which is its error like any other."""
        if not hasattr(self.instance, "counts"):
            return {}
        try:
            return msgspec.convert(msgspec.to_builtins(self.instance.counts()), dict[str, Any])
        except Exception as error:
            self._tell(f"cannot be asked for its counts(), {type(error).__name__}: {error}", error)
            return {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passage = self._passage(scope)
        call = _Call(passage)
        token = self._current.set(call)

        async def noting(message: Message) -> None:
            call.answered = True
            await send(message)

        self._stats.calls += 1
        started = time.perf_counter()
        problem = ""
        try:
            await self._through(passage, scope, receive, noting)
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

    async def _through(self, passage: Passage | None, scope: Scope, receive: Receive, send: Send) -> None:
        if passage is None:
            await self.instance(scope, receive, send)
            return
        try:
            await self.instance(scope, passage.receiving(receive), passage.answering(send))
            await passage.flush(send)
        finally:
            if passage.changed:
                self._tell_of_change()

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        # A task of the middleware's own serves no request in particular.
        call = self._current.get(None) or _Call()
        call.entered = True
        if call.passage is not None:
            receive, send = call.passage.forwarding(receive), call.passage.returning(send)
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

    def _passage(self, scope: Scope) -> Passage | None:
        """Return what stamps the answer; None where the middleware is trusted, or the request asks for no tokens."""
        if self._declares is False or scope.get("method") != "POST" or not allowed_methods(scope["path"]):
            return None
        return Passage(self._stamp, declared=bool(self._declares))

    def _tell_of_change(self) -> None:
        self._changed += 1
        if self._changed.bit_count() == 1:
            advice = "declare changes_tokens = True, or False if tokens stay what they are"
            _log.warning("%s changed a body (%d so far) and declares nothing: %s", self._name, self._changed, advice)
