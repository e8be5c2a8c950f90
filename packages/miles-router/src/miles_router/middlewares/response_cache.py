"""Answer a deterministic request that was answered before, while the engine still serves the weights it came from.

Deterministic is a `/generate` request without streaming whose every sampling is at temperature 0 or brings its own
`sampling_seed`; that the engines then repeat themselves is theirs to keep (SGLang's --enable-deterministic-inference).
Before each of these, an engine that the request could go to says on `/model_info` which model and weight version it
serves. An answer is kept if it states that version itself, and given again while model and version are the same. A
version that nobody sets ("default") stays what it is when weights are updated: nothing is kept under it.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from miles_api.options import Options, options_from
from miles_router.messages import CHOSEN, PREFERRED
from miles_router.middlewares.bodies import generate_body, giving, question
from miles_router.model_info import MODEL_INFO_PATHS, ModelInfo, model_info
from miles_router.routing import WEIGHT_VERSION

if TYPE_CHECKING:
    from miles_router.handle import RouterHandle
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["ResponseCache", "ResponseCacheOptions"]

_HEADER = b"x-miles-cache"
_OK = 200
_NOT_FOUND = 404
_UNSET = ("", "default")
"""Weight versions that say nothing: SGLang's own, where nobody gave one."""
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


_request = msgspec.json.Decoder(_Request)
_replies = msgspec.json.Decoder(_Reply | list[_Reply])


class _Entry(msgspec.Struct):
    served: ModelInfo
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
        self._max_body = router.options.router_max_body_bytes
        self._limit = mine.response_cache_bytes
        self._entries: OrderedDict[bytes, _Entry] = OrderedDict()
        self._size = self._hits = self._misses = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer from the cache, or pass on and keep the answer; what cannot repeat passes through."""
        body = await generate_body(self._app, scope, receive, send, self._max_body)
        if body is None:
            return
        receive = giving(body, receive)
        if not _repeats(body):
            await self._app(scope, receive, send)
            return
        key, served = _key(scope, body), await self._served(scope)
        entry = self._entries.get(key)
        if entry is not None and entry.served == served:
            self._entries.move_to_end(key)
            self._hits += 1
            await send({"type": "http.response.start", "status": _OK, "headers": [*entry.headers, (_HEADER, b"hit")]})
            await send({"type": "http.response.body", "body": entry.body, "more_body": False})
            return
        self._misses += 1
        answer = _Answer(self._limit)
        await self._app(scope, receive, answer.sending(send))
        if served is not None and served.weight_version == _version_of(answer):
            self._keep(key, served, answer)

    def counts(self) -> dict[str, int]:
        """Say how often it answered, how often it could have, and what it holds."""
        return {"hits": self._hits, "misses": self._misses, "entries": len(self._entries), "bytes": self._size}

    def _could_answer(self, scope: Scope) -> list[str]:
        """Return the engines that this request could go to now, as the router decides it."""
        chosen, loads, versions = scope.get(CHOSEN), self._router.loads, self._router.versions
        wanted = next((value.decode("latin-1") for name, value in scope["headers"] if name == WEIGHT_VERSION), None)
        urls = [url for url in loads if (chosen is None or url in chosen) and wanted in (None, versions.get(url))]
        preferred = scope.get(PREFERRED)
        return [preferred] if preferred in urls else sorted(urls, key=lambda url: loads[url])

    async def _served(self, scope: Scope) -> ModelInfo | None:
        """Ask what is served; None where nobody says, or nobody could know from it."""
        urls = self._could_answer(scope)
        if not urls:
            return None
        for path in MODEL_INFO_PATHS:
            asked = question(scope, "GET", path)
            self._router.choose(asked, urls[0])
            answer = _Answer(self._limit)
            await self._app(asked, giving(b""), answer.sending(None))
            if answer.status != _NOT_FOUND:
                break
        try:
            said = model_info(answer.body) if answer.status == _OK and answer.whole else ModelInfo()
        except msgspec.DecodeError:
            return None
        return None if said.version in _UNSET else ModelInfo(said.version, said.model_path)

    def _keep(self, key: bytes, served: ModelInfo, answer: _Answer) -> None:
        headers = [pair for pair in answer.headers if pair[0].lower() not in (b"set-cookie", b"date", _HEADER)]
        entry = _Entry(served, headers, answer.body)
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
    chosen, preferred = scope.get(CHOSEN), scope.get(PREFERRED)
    where = (None if chosen is None else sorted(chosen), preferred)
    said = [pair for pair in scope["headers"] if pair[0] in (b"authorization", WEIGHT_VERSION)]
    digest = hashlib.blake2b(digest_size=16)
    for part in (scope["raw_path"], scope["query_string"], msgspec.json.encode(where), repr(said).encode(), body):
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.digest()
