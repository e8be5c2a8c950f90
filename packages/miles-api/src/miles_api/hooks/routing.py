"""Routing hooks: what happens to a request on its way to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from miles_api.spec import hook

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@hook(
    flag="--miles-router-middleware-paths",
    since=(1, 0),
    side="router",
    moment="start",
    name="router_middleware",
    kind="class",
    many=True,
    default="none",
)
class RouterMiddleware(Protocol):
    """Wrap the router's ASGI app: observe, route, reject, delay or record requests.

    Built once in the router process, outermost first; called for every request that the router lets in, except
    `/health` and its own `/hooks`. Raise, and the client gets a 500 that names the middleware; the router lives on.
    `router` has `workers` (url, healthy, outstanding, weight_version of each engine), `loads` (requests under way at
    each healthy one) and `versions`, both by URL, `options` (the router's), `args` (these, and the options that it
    brings itself), `prefer(scope, url)`, which sends this request to one engine while it is healthy, and
    `choose(scope, *urls)`, which lets it go to these alone.

    Bodies pass as they are: whoever changes the tokens of a request or an answer must declare it with a class attribute
    `changes_tokens = True`. The response header `x-miles-changed-tokens` then bears its name, and so does the metadata
    of the sample, as `changed_tokens_by`. `False` says that tokens stay what they are; where nothing is declared, the
    router compares bodies and names who changed one. `counts()` may return numbers for its row in `hooks.json`.
    `aclose()` or `close()` is called at the end.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], /, *, router: Any) -> None: ...

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any, /) -> None: ...
