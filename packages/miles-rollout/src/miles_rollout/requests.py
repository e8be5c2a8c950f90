"""HTTP to the router: what was not served is sent again until the one deadline is past.

Whoever serves may die at any moment and is replaced within seconds, so a lost answer says nothing about the request.
Sending it again doubles nothing: the router forwards inference alone, which leaves nothing behind, an answer that was
lost was never seen, and a request that brings its own seed is answered with the same tokens.
"""

from __future__ import annotations

import asyncio
import functools
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import aiohttp
import msgspec

from miles_api.errors import ServiceError, counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["Requests"]

_OK = 200
_NOT_SERVED = frozenset({429, 502, 503, 504})
"""The router's middleware wants fewer requests, or the router lost its engine, has none at the moment, or the engine
stays silent. Any other 4xx and 500 is the answer."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds before a request is sent again, doubled each time; longer where `Retry-After` says so."""
_ERROR_BODY = 500
_CHANGED = "x-miles-changed-tokens"
"""The response header that names router middleware which changed the tokens."""
_ENGINE = "x-miles-engine"
"""The response header by which the router says which engine answered."""

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


class _NotServedError(Exception):
    """Nobody answered, or somebody between us and the engine did: `after` so many seconds it may be asked again."""

    def __init__(self, said: str, after: float = 0.0) -> None:
        super().__init__(said)
        self.after = after


class Requests:
    """The connections of one event loop to `url`, `http://host:port`.

    A request has `timeout` seconds for all its attempts together (`--generate-timeout`); `connections` are open at
    most.
    """

    def __init__(self, url: str, headers: Mapping[str, str], timeout: float, connections: int) -> None:
        self.url, self._timeout, self._connections = url, timeout, connections
        self.headers = {"Content-Type": "application/json", **headers}
        self._repeated = 0

    @functools.cached_property
    def session(self) -> aiohttp.ClientSession:
        """The open connections, made on first use inside the event loop."""
        connector = aiohttp.TCPConnector(limit=self._connections, keepalive_timeout=3600)
        return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=self._timeout))

    def aside(self) -> aiohttp.ClientSession:
        """Return a new connection, for a word that must not wait until a request has ended."""
        return aiohttp.ClientSession(headers=self.headers, timeout=aiohttp.ClientTimeout(total=self._timeout))

    async def post(self, path: str, payload: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """POST JSON and return the decoded answer; who made and who changed its tokens is in each `meta_info`.

        A `payload` that is a function is asked each time it is sent. Sent again where nobody served it. Raises
        `ServiceError` with status and body when it is refused, and with what was tried when the deadline is past.
        """
        url, body = self.url + path, b"" if callable(payload) else _encode(payload)
        deadline = time.monotonic() + self._timeout
        tries, pause, problem, after = 0, _FIRST_PAUSE, "", 0.0
        while (left := deadline - time.monotonic()) > 0:
            tries += 1
            self._repeated += tries > 1
            try:
                body = _encode(payload()) if callable(payload) else body
                return _stamped(url, *await self._once(url, body, left))
            except TimeoutError:
                break
            except _NotServedError as error:
                problem, after = str(error), error.after
            await asyncio.sleep(min(max(pause, after), max(deadline - time.monotonic(), 0.0)))
            pause = min(2 * pause, _LONGEST_PAUSE)
        tried = f", though it was sent {counted(tries, 'time')}; last seen: {problem}" if problem else ""
        raise ServiceError(f"{url} did not answer within --generate-timeout {self._timeout:g} s{tried}")

    async def _once(self, url: str, body: bytes, seconds: float) -> tuple[bytes, Mapping[str, str]]:
        timeout = aiohttp.ClientTimeout(total=seconds)
        try:
            async with self.session.post(url, data=body, headers=self.headers, timeout=timeout) as reply:
                answer = await reply.read()
        except TimeoutError:
            raise
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            raise _NotServedError(f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise ServiceError(f"{url}: {type(error).__name__}: {error}") from error
        if reply.status == _OK:
            return answer, reply.headers
        said = f"answered {reply.status}: {answer[:_ERROR_BODY].decode(errors='replace')}"
        if reply.status in _NOT_SERVED:
            raise _NotServedError(said, _seconds(reply.headers.get("Retry-After", "")))
        raise ServiceError(f"{url} {said}")

    def take_repeated(self) -> int:
        """Return how many requests were sent again since the last call."""
        repeated, self._repeated = self._repeated, 0
        return repeated

    async def close(self) -> None:
        """Close the connections, if there are any."""
        if "session" in self.__dict__:
            await self.session.close()


def _seconds(retry_after: str) -> float:
    """Return the seconds that a `Retry-After` names; 0 where it names a date, or nothing."""
    return float(retry_after) if retry_after.isdecimal() else 0.0


def _stamped(url: str, body: bytes, headers: Mapping[str, str]) -> Any:
    """Decode an answer and note in each `meta_info` whom the headers name, as `engine` and `changed_tokens_by`.

    Raises `ServiceError` for one that is not JSON.
    """
    try:
        answer = _decode(body)
    except msgspec.DecodeError as error:
        said_first = body[:_ERROR_BODY].decode(errors="replace")
        raise ServiceError(f"{url} answered with what is no JSON ({error}): {said_first!r}") from error
    said: dict[str, Any] = {"engine": engine} if (engine := headers.get(_ENGINE)) else {}
    if changed := headers.get(_CHANGED):
        said["changed_tokens_by"] = [unquote(name) for name in changed.split(",")]
    for reply in answer if isinstance(answer, list) else [answer]:
        if said and isinstance(reply, dict) and isinstance(reply.get("meta_info"), dict):
            reply["meta_info"] |= said
    return answer
