"""`--rm-type remote_rm`: a server scores each sample, over pooled connections, with retries, within one deadline."""

from __future__ import annotations

import asyncio
import functools
import math
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from weakref import WeakKeyDictionary

import aiohttp
import msgspec

from miles_api.errors import ConfigError, SampleError, ServiceError, counted

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["RemoteRewards", "check_rm_url", "close_remote", "remote_rm", "take_remote_metrics"]

_OK, _REDIRECTS, _TOO_MANY, _SERVER_ERRORS = 200, range(300, 400), 429, range(500, 600)
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 10.0
"""Seconds before a request is sent again, doubled each time; longer where `Retry-After` says so."""
_WARN_EVERY = 60.0
"""Seconds between two warnings that requests are sent again; one server may fail thousands of times."""
_SHOWN_BODY = 300
_MOST_BODY = 1 << 20
"""Bytes of an answer that are read: a score is short."""

# One of its own: the pauses must not shift what a seeded run draws.
_jitter = random.Random()
_encode = msgspec.json.Encoder().encode


class _NotServedError(Exception):
    """Nobody answered, or not now: after at least `after` seconds it may be asked again."""

    def __init__(self, said: str, after: float = 0.0) -> None:
        super().__init__(said)
        self.after = after


class _Settings(NamedTuple):
    url: str
    concurrency: int
    timeout: float


def check_rm_url(url: str) -> None:
    """Raise `ConfigError` unless `url` is one that `remote_rm` can post to."""
    try:
        parts = urlsplit(url)
        fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fits = False
    if not fits:
        raise ConfigError(f"--rm-url {shown_url(url)!r} is no address to post to: http://HOST:PORT/PATH, or https")


def shown_url(url: str) -> str:
    """Return a URL as errors show it: without user, password and query, which may hold a key."""
    plain = url.partition("?")[0].partition("#")[0]
    scheme, mark, rest = plain.rpartition("://")
    host, slash, path = rest.partition("/")
    return scheme + mark + host.rpartition("@")[2] + slash + path


async def remote_rm(args: Args, sample: Sample) -> float | dict[str, float]:
    """Return the score that `--rm-url` gives a sample: POST `{prompt, response, label}`, a number comes back.

    The answer may be an object too. With `--reward-key` its numbers are the entries of a dict reward; without, its
    `reward` is the score. Raises `ServiceError` with status and body when the server refuses or its answer is no score,
    and with what was tried when `--rm-url-timeout` is past.
    """
    try:
        body = _encode({"prompt": sample.prompt, "response": sample.response, "label": sample.label})
    except (TypeError, ValueError) as error:
        raise SampleError(f"sample {sample.index} cannot be sent to --rm-url as JSON: {error}") from error
    server = _server_of(args)
    answer = await server.post(body)
    return server.score(answer, several=bool(args.reward_key or args.eval_reward_key))


class RemoteRewards:
    """The connections of one event loop to one reward server."""

    def __init__(self, url: str, concurrency: int, timeout: float) -> None:
        self._url, self._timeout, self._concurrency = url, timeout, concurrency
        self._name = f"--rm-url {shown_url(url)}"
        self._slots = asyncio.Semaphore(concurrency)
        self._warned = -math.inf
        self.answered, self.seconds, self.retries = 0, 0.0, 0
        """Since they were last taken: answers, seconds they took with all their attempts, requests sent again."""

    @functools.cached_property
    def session(self) -> aiohttp.ClientSession:
        """The open connections, made on first use inside the event loop."""
        connector = aiohttp.TCPConnector(limit=self._concurrency)
        # The deadline is one for all attempts; aiohttp's own would begin anew with each.
        return aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=None),
            headers={"Content-Type": "application/json"},
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def post(self, body: bytes) -> bytes:
        """Return the body of a 200 answer; what nobody served is sent again until the deadline.

        Waiting for one of the `--rm-concurrency` slots does not count: each is free again within the deadline.
        """
        async with self._slots:
            started = time.monotonic()
            tried: list[str] = []
            try:
                async with asyncio.timeout(self._timeout):
                    answer = await self._until_served(body, tried, started + self._timeout)
            except TimeoutError as error:
                raise ServiceError(self._late(tried)) from error
            self.answered += 1
            self.seconds += time.monotonic() - started
            return answer

    async def _until_served(self, body: bytes, tried: list[str], deadline: float) -> bytes:
        pause = _FIRST_PAUSE
        while True:
            try:
                return await self._once(body)
            except _NotServedError as error:
                tried.append(str(error))
                wait = max(pause * _jitter.uniform(0.5, 1.0), error.after)
            # Nothing would come of waiting for a moment after the deadline.
            if time.monotonic() + wait >= deadline:
                raise TimeoutError
            self._warn(tried[-1])
            self.retries += 1
            await asyncio.sleep(wait)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _once(self, body: bytes) -> bytes:
        try:
            async with self.session.post(self._url, data=body, allow_redirects=False) as reply:
                answer = await _read(reply)
        except (aiohttp.ClientSSLError, aiohttp.InvalidURL) as error:
            raise ServiceError(f"{self._name}: {type(error).__name__}: {error}") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, ConnectionError) as error:
            raise _NotServedError(f"{type(error).__name__}: {error}") from error
        except aiohttp.ClientError as error:
            raise ServiceError(f"{self._name}: {type(error).__name__}: {error}") from error
        if reply.status == _OK:
            return answer
        said = f"answered {reply.status}: {_excerpt(answer)}"
        if reply.status == _TOO_MANY or reply.status in _SERVER_ERRORS:
            raise _NotServedError(said, _seconds(reply.headers.get("Retry-After", "")))
        if reply.status in _REDIRECTS:
            where = shown_url(reply.headers.get("Location", "")) or "nowhere"
            said = f"answered {reply.status}, a redirect to {where}, which is not followed: name the address itself"
        raise ServiceError(f"{self._name} {said}")

    def score(self, answer: bytes, *, several: bool) -> float | dict[str, float]:
        """Return the score in an answer: a number, or an object's numbers (`several`), or its `reward` alone."""
        try:
            value = msgspec.json.decode(answer)
        except (msgspec.DecodeError, RecursionError):
            raise self._no_score(answer, "it is not JSON") from None
        if not isinstance(value, dict):
            return self._number(value, "it", answer)
        # Text, lists and objects are remarks; null and booleans stand where a number was meant.
        parts = {
            name: self._number(part, f"its {name!r}", answer)
            for name, part in value.items()
            if not isinstance(part, str | list | dict)
        }
        if several:
            return parts
        if "reward" not in parts:
            raise self._no_score(answer, "an object needs a number as `reward`, or --reward-key names its score")
        return parts["reward"]

    def _number(self, value: Any, what: str, answer: bytes) -> float:
        try:
            number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self._no_score(answer, f"{what} is not a finite number")
        return number

    def _no_score(self, answer: bytes, why: str) -> ServiceError:
        return ServiceError(f"{self._name} answered 200 without a score, {why}: {_excerpt(answer)}")

    def _late(self, tried: list[str]) -> str:
        seen = f"; {counted(len(tried), 'attempt')} failed, the last one: {tried[-1]}" if tried else ""
        return f"{self._name} gave no score within --rm-url-timeout {self._timeout:g} s{seen}"

    def _warn(self, problem: str) -> None:
        """Say now and then that the server is out of reach: retries are silent otherwise."""
        now = time.monotonic()
        if now - self._warned >= _WARN_EVERY:
            self._warned = now
            print(f"warning: {self._name}: {problem}; asking again for up to {self._timeout:g} s")

    async def close(self) -> None:
        """Close the connections, if there are any."""
        if "session" in self.__dict__:
            await self.session.close()


_servers: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[_Settings, RemoteRewards]] = WeakKeyDictionary()


def _server_of(args: Args) -> RemoteRewards:
    """Return the connections of the running event loop to `args.rm_url`."""
    if not args.rm_url:
        raise ConfigError("remote_rm asks a server, and none is set: pass --rm-url")
    settings = _Settings(args.rm_url, args.rm_concurrency, args.rm_url_timeout)
    servers = _servers.setdefault(asyncio.get_running_loop(), {})
    if settings not in servers:
        check_rm_url(args.rm_url)
        servers[settings] = RemoteRewards(*settings)
    return servers[settings]


def take_remote_metrics() -> dict[str, float]:
    """Return `rm_seconds`, the mean time to a score, and `rm_retries` since the last call; empty without answers."""
    servers = _servers.get(asyncio.get_running_loop(), {}).values()
    answered, seconds, retries = (sum(getattr(s, name) for s in servers) for name in ("answered", "seconds", "retries"))
    for server in servers:
        server.answered, server.seconds, server.retries = 0, 0.0, 0
    metrics = {"rollout/rm_seconds": seconds / answered} if answered else {}
    return metrics | ({"rollout/rm_retries": float(retries)} if retries else {})


async def close_remote() -> None:
    """Close the connections of the running event loop to reward servers."""
    for server in _servers.pop(asyncio.get_running_loop(), {}).values():
        await server.close()


async def _read(reply: aiohttp.ClientResponse) -> bytes:
    body = bytearray()
    async for chunk in reply.content.iter_any():
        body += chunk
        if len(body) > _MOST_BODY:
            reply.close()
            break
    return bytes(body)


def _excerpt(body: bytes) -> str:
    return body[: 4 * _SHOWN_BODY].decode(errors="replace")[:_SHOWN_BODY] or "(an empty body)"


def _seconds(retry_after: str) -> float:
    """Return how many seconds ahead a `Retry-After` points, in seconds or as a date; 0 for anything else."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        moment = parsedate_to_datetime(retry_after)
    except (ValueError, OverflowError):
        return 0.0
    moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return max((moment - datetime.now(UTC)).total_seconds(), 0.0)
