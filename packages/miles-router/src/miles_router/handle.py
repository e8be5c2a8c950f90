"""What a middleware is given as `router`: the engines, the options, and a say in who gets a request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from .messages import CHOSEN, PREFERRED

if TYPE_CHECKING:
    from miles_api.args import Args

    from .app import RouterApp
    from .messages import Scope
    from .options import RouterOptions

__all__ = ["RouterHandle", "WorkerInfo"]


class WorkerInfo(msgspec.Struct, frozen=True):
    """One registered engine, as a middleware sees it."""

    url: str
    healthy: bool
    outstanding: int
    """Requests sent to it that are not answered yet."""
    weight_version: str
    """The version it was registered with; empty means any. What it serves now, its `/model_info` says."""


class RouterHandle:
    """The router, as one middleware sees it."""

    def __init__(self, app: RouterApp, options: RouterOptions, args: Args) -> None:
        self._app = app
        self.options: RouterOptions = msgspec.structs.replace(options, router_token=None)
        """The router's options, without the token."""
        self.args: Args = args
        """These and the options that middleware brings, by name, as other hooks have them."""

    @property
    def workers(self) -> list[WorkerInfo]:
        """The registered engines as they are now, in order of registration."""
        return [WorkerInfo(w.url, w.healthy, w.outstanding, w.weight_version) for w in self._app.registry]

    @property
    def loads(self) -> dict[str, int]:
        """Requests under way at each healthy engine, by URL."""
        return {worker.url: worker.outstanding for worker in self._app.registry.healthy}

    @property
    def versions(self) -> dict[str, str]:
        """The weight version that each engine was registered with, by URL."""
        return {worker.url: worker.weight_version for worker in self._app.registry}

    def prefer(self, scope: Scope, url: str) -> None:
        """Send this request to the engine at `url` while it is healthy; otherwise the policy picks, as without."""
        scope[PREFERRED] = url

    def choose(self, scope: Scope, *urls: str) -> None:
        """Send this request to one of these engines or to nobody: 503 while none of them is healthy."""
        scope[CHOSEN] = frozenset(urls)
