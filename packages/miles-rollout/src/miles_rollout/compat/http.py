"""`post` and `get` by URL, as hooks of the older stacks call them; the router's token goes to the router alone."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from miles_api.errors import ServiceError
from miles_rollout import running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

__all__ = ["get", "post"]

_ERROR_BODY = 500
_SECOND_CHANCE = frozenset({408, 429, 500, 502, 503, 504})
_PAUSE = 1.0
"""Seconds between two attempts."""


async def post(
    url: str,
    payload: Any,
    max_retries: int = 60,
    action: str = "post",
    headers: Mapping[str, str] | None = None,
) -> Any:
    """Send JSON and return the decoded answer, or its text if it is not JSON; `action` may be get, put or delete.

    A refused connection or a busy server is asked again up to `max_retries` times in all, a second apart. Raises
    `ServiceError` with status and body.
    """
    state = running.of_this_loop()
    interrupts = None if state is None else state.interrupts
    if state is None or interrupts is None:
        return await _until_served(url, action, lambda: payload, headers, max_retries)
    path = url.removeprefix(state.requests.url)
    if state.aborted and (refusal := interrupts.refusal(path, payload)) is not None:
        return refusal
    with interrupts.named(path, payload) as body:
        return await _until_served(url, action, body, headers, max_retries)


async def _until_served(
    url: str, action: str, body: Callable[[], Any], headers: Mapping[str, str] | None, max_retries: int
) -> Any:
    for attempt in range(1, max_retries + 1):
        sent = None if action in ("get", "delete") else msgspec.json.encode(body() or {})
        try:
            return await _once(url, action, sent, headers)
        except _BusyError as error:
            if attempt == max_retries:
                raise ServiceError(str(error)) from error
        await asyncio.sleep(_PAUSE)
    raise ServiceError(f"{url}: max_retries is {max_retries}")


async def get(url: str) -> Any:
    """Fetch and decode JSON; raises `ServiceError` with status and body."""
    return await post(url, None, max_retries=1, action="get")


class _BusyError(Exception):
    """Worth another attempt."""


async def _once(url: str, action: str, body: bytes | None, headers: Mapping[str, str] | None) -> Any:
    sent = {"Content-Type": "application/json", **_authorization(url), **(headers or {})}
    try:
        async with _session() as session, session.request(action, url, data=body, headers=sent) as reply:
            answer, status = await reply.read(), reply.status
    except (aiohttp.ClientConnectionError, ConnectionError) as error:
        raise _BusyError(f"{url}: {type(error).__name__}: {error}") from error
    except (TimeoutError, aiohttp.ClientError) as error:
        raise ServiceError(f"{url}: {type(error).__name__}: {error}") from error
    if status >= 400:  # noqa: PLR2004
        text = f"{url} answered {status}: {answer[:_ERROR_BODY].decode(errors='replace')}"
        raise _BusyError(text) if status in _SECOND_CHANCE else ServiceError(text)
    try:
        return msgspec.json.decode(answer)
    except msgspec.DecodeError:
        return answer.decode(errors="replace")


@asynccontextmanager
async def _session() -> AsyncIterator[aiohttp.ClientSession]:
    """Yield the connections of this loop's rollout; a loop without one gets some for this request."""
    state = running.of_this_loop()
    if state is not None and not state.requests.session.closed:
        yield state.requests.session
        return
    args = running.announced()
    timeout = aiohttp.ClientTimeout(total=None if args is None else args.generate_timeout)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        yield session


def _authorization(url: str) -> dict[str, str]:
    args = running.announced()
    if args is None or "router_token" not in args or not args.router_token:
        return {}
    router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
    return {"Authorization": f"Bearer {args.router_token}"} if url == router or url.startswith(f"{router}/") else {}
