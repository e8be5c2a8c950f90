"""A retrieval server over HTTP, in the form that Search-R1 published: POST `/retrieve` with queries and topk."""

from __future__ import annotations

import asyncio
from weakref import WeakKeyDictionary

import aiohttp
import msgspec

from miles_api.errors import ConfigError, ServiceError
from miles_hooks_contrib.search_r1.retrieval import Hit, Query, Reply

__all__ = ["Remote"]

_OK, _TOO_MANY, _SERVER_ERRORS = 200, 429, range(500, 600)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0
"""Seconds before a search is sent again, doubled each time."""
_SHOWN_BODY = 300

_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(Reply).decode


class _NotServedError(Exception):
    """Nobody answered, or the server could not; it may be asked again."""


class Remote:
    """A retrieval server, with connections for each event loop: a rollout hook may run one for each rollout."""

    def __init__(self, url: str, token: str | None, timeout: float) -> None:
        """Take the address of `/retrieve` itself. Raises `ConfigError` for one that is not http or https."""
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--search-url {url}: expected an address such as http://127.0.0.1:8000/retrieve")
        self._url, self._timeout = url, timeout
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers["Authorization"] = f"Bearer {token}"
        self._sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, aiohttp.ClientSession] = WeakKeyDictionary()

    def _session(self) -> aiohttp.ClientSession:
        loop = asyncio.get_running_loop()
        if loop not in self._sessions:
            # How many requests there are at once is bounded by who asks, and so is how long one may take.
            connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=None)
            self._sessions[loop] = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._sessions[loop]

    async def search(self, query: str, topk: int) -> list[Hit]:
        """Return what the server finds; what it could not serve is sent again until the deadline.

        Raises `ServiceError` with what the server said when it refuses, answers in another form, or stays out of reach.
        """
        loop = asyncio.get_running_loop()
        body = _encode(Query([query], topk, return_scores=True))
        end, pause, tries = loop.time() + self._timeout, _FIRST_PAUSE, 0
        while True:
            tries += 1
            try:
                return await self._once(body, end - loop.time())
            except _NotServedError as error:
                if loop.time() + pause >= end:
                    raise ServiceError(
                        f"--search-url {self._url} served no search within --search-timeout {self._timeout:g} s, "
                        f"{tries} attempts; the last one: {error}"
                    ) from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _once(self, body: bytes, seconds: float) -> list[Hit]:
        try:
            async with asyncio.timeout(seconds), self._session().post(
                self._url, data=body, headers=self._headers, allow_redirects=False
            ) as reply:  # fmt: skip
                answer = await reply.read()
        except TimeoutError as error:
            raise _NotServedError("it did not answer") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _NotServedError(f"{type(error).__name__}: {error}") from error
        said = answer[:_SHOWN_BODY].decode(errors="replace")
        if reply.status == _TOO_MANY or reply.status in _SERVER_ERRORS:
            raise _NotServedError(f"it answered {reply.status}: {said}")
        if reply.status != _OK:
            raise ServiceError(f"--search-url {self._url} answered {reply.status}: {said}")
        try:
            [hits] = _decode(answer).result
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            raise ServiceError(
                f"--search-url {self._url} answered in another form than "
                f'{{"result": [[{{"document": {{"contents": …}}, "score": …}}]]}}, {error}: {said}'
            ) from error
        return hits

    async def aclose(self) -> None:
        """Close the connections of the running event loop, if there are any."""
        session = self._sessions.pop(asyncio.get_running_loop(), None)
        if session is not None:
            await session.close()
