"""One question to an OpenAI-compatible endpoint, asked again until the deadline where nobody served it."""

from __future__ import annotations

import asyncio
import functools
import random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp
import msgspec

from miles_api.errors import ConfigError, ServiceError, counted

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["ChatEndpoint", "check_url"]

_OK, _TIMED_OUT, _TOO_MANY, _SERVER_ERRORS = 200, 408, 429, range(500, 600)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 10.0
"""Seconds before a question is asked again, doubled each time; longer where `Retry-After` says so."""
_SHOWN = 300
_MOST_BODY = 4 << 20

# One of its own: the pauses must not shift what a seeded run draws.
_jitter = random.Random()


class _NotServedError(Exception):
    """Nobody answered, or not now: after at least `after` seconds it may be asked again."""

    def __init__(self, said: str, after: float = 0.0) -> None:
        super().__init__(said)
        self.after = after


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    choices: list[_Choice]


def check_url(flag: str, url: str) -> None:
    """Raise `ConfigError` unless `url` is an http or https address without a password."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.password is None
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"{flag}: expected an address such as http://127.0.0.1:8000/v1, without user and password")


class ChatEndpoint:
    """The connections of one event loop to `URL/chat/completions`."""

    def __init__(self, url: str, key: str | None, *, concurrency: int, timeout: float, flag: str) -> None:
        """`flag` is the option that names the address, for errors; none of them shows the key."""
        self._url, self._timeout, self._concurrency = url.rstrip("/") + "/chat/completions", timeout, concurrency
        self._name = f"{flag} {self._url.partition('?')[0]}"
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._slots = asyncio.Semaphore(concurrency)

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:
        # The deadline is one for all attempts; aiohttp's own would begin anew with each.
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency),
            timeout=aiohttp.ClientTimeout(total=None),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def ask(self, payload: Mapping[str, Any]) -> str:
        """Return the text of the first choice.

        Waiting for a slot does not count as time. Raises `ServiceError` with what was said when the server refuses,
        answers in another form, cuts its answer short, or does not serve before the deadline.
        """
        body = msgspec.json.encode(payload)
        async with self._slots:
            tried: list[str] = []
            try:
                async with asyncio.timeout(self._timeout):
                    return self._text(await self._until_served(body, tried))
            except TimeoutError as error:
                seen = f"; {counted(len(tried), 'attempt')} failed, the last one: {tried[-1]}" if tried else ""
                raise ServiceError(f"{self._name} did not answer within {self._timeout:g} s{seen}") from error

    async def _until_served(self, body: bytes, tried: list[str]) -> bytes:
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE
        end = loop.time() + self._timeout
        while True:
            try:
                return await self._once(body)
            except _NotServedError as error:
                tried.append(str(error))
                wait = max(pause * _jitter.uniform(0.5, 1.0), error.after)
            # Nothing would come of waiting for a moment after the deadline.
            if loop.time() + wait >= end:
                raise TimeoutError
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _once(self, body: bytes) -> bytes:
        try:
            async with self._session.post(self._url, data=body, headers=self._headers, allow_redirects=False) as reply:
                answer = await _read(reply)
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise ServiceError(f"{self._name}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise _NotServedError(f"{type(error).__name__}: {error}") from error
        if reply.status == _OK:
            return answer
        said = f"answered {reply.status}: {_excerpt(answer)}"
        if reply.status in (_TIMED_OUT, _TOO_MANY) or reply.status in _SERVER_ERRORS:
            raise _NotServedError(said, _seconds(reply.headers.get("Retry-After", "")))
        raise ServiceError(f"{self._name} {said}")

    def _text(self, answer: bytes) -> str:
        try:
            choice = msgspec.json.decode(answer, type=_Completion).choices[0]
        except (msgspec.DecodeError, IndexError, UnicodeDecodeError) as error:
            raise ServiceError(f"{self._name} answered no chat completion, {error}: {_excerpt(answer)}") from error
        if choice.finish_reason == "length":
            raise ServiceError(
                f"{self._name} cut its answer off at the token limit: {(choice.message.content or '')!r}"
            )
        if not choice.message.content:
            raise ServiceError(f"{self._name} answered without text (finish_reason {choice.finish_reason!r})")
        return choice.message.content

    async def close(self) -> None:
        """Close the connections, if there are any."""
        if "_session" in self.__dict__:
            await self._session.close()


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > _MOST_BODY:
            raise ServiceError(f"an answer of more than {_MOST_BODY} bytes, which no verdict is")
    return bytes(body)


def _excerpt(body: bytes) -> str:
    return body[: 4 * _SHOWN].decode(errors="replace")[:_SHOWN] or "(an empty body)"


def _seconds(retry_after: str) -> float:
    return float(retry_after) if retry_after.isdecimal() else 0.0
