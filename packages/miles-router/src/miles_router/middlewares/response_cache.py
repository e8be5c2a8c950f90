"""Answer a deterministic request that was answered before, while the engine still serves the weights it came from.

Deterministic is a `/generate` request without streaming whose every sampling is at temperature 0 or brings its own
`sampling_seed`; that the engines then repeat themselves is theirs to keep (SGLang's --enable-deterministic-inference).
An answer is kept under the weight version that it states itself, and given only after an engine has said, on
`/model_info`, that it serves that version now: nothing is stale after weights were updated.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from miles_api.options import Options, options_from
from miles_router.middlewares.bodies import giving, whole_body

if TYPE_CHECKING:
    from miles_router.handle import RouterHandle
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["ResponseCache", "ResponseCacheOptions"]

_HEADER = b"x-miles-cache"
_OK = 200
_NOT_FOUND = 404
_INFO = ("/model_info", "/get_model_info")
_OVERHEAD = 512
"""Bytes that an entry takes beside its body."""


class ResponseCacheOptions(Options, frozen=True, kw_only=True):
    """How much is kept of answers to deterministic requests."""

    response_cache_bytes: Annotated[int, msgspec.Meta(ge=1)] = 256 << 20
    """Bytes of answers that are kept; beyond, the one unused for longest goes."""


class _Sampling(msgspec.Struct):
    temperature: float = 1.0
    sampling_seed: int | None = None

    @property
    def repeats(self) -> bool:
        return self.temperature == 0 or self.sampling_seed is not None


class _Request(msgspec.Struct):
    sampling_params: _Sampling | list[_Sampling] | None = None
    stream: bool = False

    @property
    def repeats(self) -> bool:
        params = self.sampling_params
        if self.stream or params is None:
            return False
        return all(one.repeats for one in params) if isinstance(params, list) else params.repeats


class _Finish(msgspec.Struct):
    type: str


class _Meta(msgspec.Struct):
    weight_version: str | int | None = None
    weight_versions: list[Any] | None = None
    finish_reason: _Finish | None = None


class _Reply(msgspec.Struct):
    meta_info: _Meta


class _Info(msgspec.Struct):
    weight_version: str | int | None = None


_request = msgspec.json.Decoder(_Request)
_replies = msgspec.json.Decoder(_Reply | list[_Reply])


class _Entry(msgspec.Struct):
    version: str
    headers: list[tuple[bytes, bytes]]
    body: bytes

    @property
    def size(self) -> int:
        return len(self.body) + _OVERHEAD


class ResponseCache:
    """Answers bear `x-miles-cache`: hit or miss. Tokens are those that an engine generated with the same weights."""

    options = ResponseCacheOptions
    changes_tokens = False

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        mine: ResponseCacheOptions = options_from(router.args, ResponseCacheOptions)
        self._app = app
        self._router = router
        self._limit = mine.response_cache_bytes
        self._max_body = router.options.router_max_body_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._size = self._hits = self._misses = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from the cache, or pass on and keep the answer; what cannot repeat passes through."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/generate":
            await self._app(scope, receive, send)
            return
        body = await whole_body(self._app, scope, receive, send, self._max_body)
        if body is None:
            return
        receive = giving(body, receive)
        if not _repeats(body):
            await self._app(scope, receive, send)
            return
        key = _key(scope, body)
        if (entry := await self._fresh(key, scope)) is not None:
            self._hits += 1
            await send({"type": "http.response.start", "status": _OK, "headers": [*entry.headers, (_HEADER, b"hit")]})
            await send({"type": "http.response.body", "body": entry.body, "more_body": False})
            return
        self._misses += 1
        answer = _Answer(self._limit)
        await self._app(scope, receive, answer.sending(send))
        self._keep(key, answer)

    def counts(self) -> dict[str, int]:
        """Say how often it answered, how often it could have, and what it holds."""
        return {"hits": self._hits, "misses": self._misses, "entries": len(self._entries), "bytes": self._size}

    async def _fresh(self, key: bytes, scope: Scope) -> _Entry | None:
        """Return the entry if an engine that could answer now serves the weights it came from."""
        if key not in self._entries:
            return None
        version = await self._version(scope)
        entry = self._entries.get(key)
        if entry is None or version is None or entry.version != version:
            return None
        self._entries.move_to_end(key)
        return entry

    async def _version(self, scope: Scope) -> str | None:
        loads = self._router.loads
        if not loads:
            return None
        url = min(loads, key=lambda url: loads[url])
        for path in _INFO:
            asked = _question(scope, path)
            self._router.choose(asked, url)
            answer = _Answer(self._limit)
            await self._app(asked, giving(b""), answer.sending(None))
            if answer.status != _NOT_FOUND:
                break
        try:
            version = msgspec.json.decode(answer.body, type=_Info).weight_version if answer.status == _OK else None
        except msgspec.DecodeError:
            return None
        return None if version is None else str(version)

    def _keep(self, key: bytes, answer: _Answer) -> None:
        version = _version_of(answer)
        if version is None:
            return
        headers = [pair for pair in answer.headers if pair[0].lower() not in (b"set-cookie", b"date", _HEADER)]
        entry = _Entry(version, headers, answer.body)
        old = self._entries.pop(key, None)
        self._size += entry.size - (0 if old is None else old.size)
        self._entries[key] = entry
        while self._size > self._limit:
            self._size -= self._entries.popitem(last=False)[1].size


class _Answer:
    """An answer as it passes; what is longer than `limit` is not held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parts: list[bytes] = []
        self._size = 0
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.complete = False

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    def sending(self, send: Send | None) -> Send:
        """Return the `send` that holds what it passes on; to nobody where there is none."""

        async def noting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status, self.headers = message["status"], list(message.get("headers", ()))
                message = {**message, "headers": [*self.headers, (_HEADER, b"miss")]}
            elif message["type"] == "http.response.body":
                self._hold(message.get("body", b""))
                self.complete = not message.get("more_body", False)
            if send is not None:
                await send(message)

        return noting

    def _hold(self, part: bytes) -> None:
        self._size += len(part)
        if self._size <= self._limit:
            self._parts.append(part)
        else:
            self._parts.clear()

    @property
    def whole(self) -> bool:
        return self.complete and self._size <= self._limit


def _repeats(body: bytes) -> bool:
    try:
        return _request.decode(body).repeats
    except msgspec.DecodeError:
        return False


def _version_of(answer: _Answer) -> str | None:
    """Return the one weight version that all of a finished answer came from; None for any other answer."""
    encoded = any(name.lower() == b"content-encoding" for name, _ in answer.headers)
    if answer.status != _OK or not answer.whole or encoded:
        return None
    try:
        replies = _replies.decode(answer.body)
    except msgspec.DecodeError:
        return None
    metas = [reply.meta_info for reply in (replies if isinstance(replies, list) else [replies])]
    if any(meta.finish_reason is None or meta.finish_reason.type == "abort" for meta in metas):
        return None
    versions = {meta.weight_version for meta in metas}
    if len(versions) != 1 or any(len(meta.weight_versions or ()) > 1 for meta in metas):
        return None
    version = versions.pop()
    return None if version is None else str(version)


def _key(scope: Scope, body: bytes) -> bytes:
    """Hash what an answer may depend on; who may not ask an engine must not be given its answer."""
    token = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    digest = hashlib.blake2b(digest_size=16)
    for part in (scope["raw_path"], scope["query_string"], token, body):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()


def _question(scope: Scope, path: str) -> Scope:
    about_body = (b"content-length", b"content-type", b"content-encoding", b"transfer-encoding", b"expect")
    headers = [pair for pair in scope["headers"] if pair[0] not in about_body]
    target = {"path": path, "raw_path": path.encode(), "query_string": b""}
    return {**scope, **target, "method": "GET", "headers": headers}
