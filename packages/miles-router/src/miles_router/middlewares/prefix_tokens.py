"""Conversations sent as text keep the tokens that were generated: an answer is never turned into text and back.

A client that sends the whole conversation as `text`, turn by turn, has the engine tokenise the earlier answers anew;
other tokens than were generated may come out, with log-probs that are not those of any generation. Here the text that
the engines were given and that they answered is remembered with its tokens. Of a text that goes on from there, the rest
alone is tokenised (by an engine's `/tokenize`), and the engine is sent `input_ids`. The answer says under
`meta_info.prompt_token_ids` which.

Texts are told apart by session (`X-Session-Id`, or `session_id` in the body): without one, two samples of one prompt
that said the same with other tokens are taken for each other.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from miles_api.errors import HookError
from miles_api.options import Options, options_from
from miles_router.middlewares.bodies import giving, whole_body

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_router.handle import RouterHandle
    from miles_router.messages import Message, Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["PrefixTokens", "PrefixTokensOptions", "Texts"]

_BLOCK = 64
"""Characters that are hashed at once to find the longest known beginning of a text."""
_OK = 200
_ABOUT_BODY = (b"content-length", b"content-encoding", b"transfer-encoding")


class PrefixTokensOptions(Options, frozen=True, kw_only=True):
    """How much is remembered of conversations."""

    prefix_tokens_kept: Annotated[int, msgspec.Meta(ge=1)] = 16 << 20
    """Tokens that are remembered; beyond, the text unused for longest is forgotten, and tokenised anew."""


class _Known(msgspec.Struct):
    text: str
    tokens: list[int]


class Texts:
    """Texts with their tokens; finds the longest that another text begins with."""

    def __init__(self, most_tokens: int) -> None:
        self._most, self.tokens = most_tokens, 0
        # By the hash of a text's whole blocks: those that differ in the rest alone.
        self._known: OrderedDict[bytes, dict[str, _Known]] = OrderedDict()

    def add(self, session: str, known: _Known) -> None:
        """Remember a text; one that is known already gets other tokens."""
        *_, (key, end) = _beginnings(session, known.text)
        alike = self._known.setdefault(key, {})
        rest = known.text[end:]
        self.tokens += len(known.tokens) - (len(alike[rest].tokens) if rest in alike else 0)
        alike[rest] = known
        self._known.move_to_end(key)
        while self.tokens > self._most:
            _, gone = self._known.popitem(last=False)
            self.tokens -= sum(len(each.tokens) for each in gone.values())

    def find(self, session: str, text: str) -> _Known | None:
        """Return the longest text that this one begins with."""
        for key, end in reversed(list(_beginnings(session, text))):
            rest = text[end : end + _BLOCK]
            found = [known for tail, known in self._known.get(key, {}).items() if rest.startswith(tail)]
            if found:
                self._known.move_to_end(key)
                return max(found, key=lambda known: len(known.text))
        return None


def _beginnings(session: str, text: str) -> Iterator[tuple[bytes, int]]:
    """Yield hash and length of a text's first 0, 1, 2, … whole blocks."""
    digest = hashlib.blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16)
    yield digest.digest(), 0
    for end in range(_BLOCK, len(text) + 1, _BLOCK):
        digest.update(text[end - _BLOCK : end].encode("utf-8", "surrogatepass"))
        yield digest.digest(), end


class PrefixTokens:
    """Sends `input_ids` in the place of a `text`; what has no text, several, or asks for a stream passes through."""

    options = PrefixTokensOptions
    changes_tokens = True

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        mine: PrefixTokensOptions = options_from(router.args, PrefixTokensOptions)
        self._app = app
        self._max_body = router.options.router_max_body_bytes
        self._texts = Texts(mine.prefix_tokens_kept)
        self._continued = self._begun = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replace the text of a request, and remember what is answered."""
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] != "/generate":
            await self._app(scope, receive, send)
            return
        body = await whole_body(self._app, scope, receive, send, self._max_body)
        if body is None:
            return
        payload = _payload(body)
        if payload is None:
            await self._app(scope, giving(body, receive), send)
            return
        session, text = _session(scope, payload), payload.pop("text")
        tokens = await self._tokens(scope, session, text)
        answer = _Whole()
        sent = msgspec.json.encode({**payload, "input_ids": tokens})
        await self._app(_without_lengths(scope), giving(sent, receive), answer.take)
        await answer.give(send, self._noted(answer, session, text, tokens))

    def counts(self) -> dict[str, int]:
        """Say how many texts went on from a known one, how many began anew, and how many tokens are remembered."""
        return {"continued": self._continued, "begun": self._begun, "tokens": self._texts.tokens}

    async def _tokens(self, scope: Scope, session: str, text: str) -> list[int]:
        known = self._texts.find(session, text)
        if known is None:
            self._begun += 1
            return await self._tokenise(scope, text, special=True)
        self._continued += 1
        rest = text[len(known.text) :]
        new = await self._tokenise(scope, rest, special=False) if rest else []
        return known.tokens + new

    async def _tokenise(self, scope: Scope, text: str, *, special: bool) -> list[int]:
        """Ask an engine. Raises `HookError` if it does not say."""
        body = msgspec.json.encode({"model": "default", "prompt": text, "add_special_tokens": special})
        path = {"path": "/tokenize", "raw_path": b"/tokenize", "query_string": b""}
        answer = _Whole()
        await self._app({**_without_lengths(scope), **path}, giving(body), answer.take)
        try:
            said = msgspec.json.decode(answer.body)["tokens"] if answer.status == _OK else None
            return msgspec.convert(said, list[int])
        except (msgspec.MsgspecError, KeyError, TypeError) as error:
            raise HookError(
                f"prefix_tokens needs the engines' /tokenize, which answered {answer.status}: {answer.body[:200]!r}"
            ) from error

    def _noted(self, answer: _Whole, session: str, text: str, tokens: list[int]) -> bytes:
        """Remember the tokens of text and answer; return the answer's body with those of the prompt."""
        try:
            reply: Any = msgspec.json.decode(answer.body) if answer.status == _OK else {}
            said, generated, meta = reply["text"], reply["output_ids"], reply["meta_info"]
        except (msgspec.DecodeError, TypeError, KeyError):
            return answer.body
        kept = _said(generated, meta.get("finish_reason") or {})
        if kept is not None:
            self._texts.add(session, _Known(text + said, tokens + kept))
        meta["prompt_token_ids"] = tokens
        return msgspec.json.encode(reply)


class _Whole:
    """An answer that is held until it is complete."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._headers: list[tuple[bytes, bytes]] = []
        self.status = 0

    @property
    def body(self) -> bytes:
        return b"".join(self._parts)

    async def take(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status, self._headers = message["status"], list(message.get("headers", ()))
        else:
            self._parts.append(message.get("body", b""))

    async def give(self, send: Send, body: bytes) -> None:
        kept = [pair for pair in self._headers if pair[0].lower() != b"content-length"]
        headers = [*kept, (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": False})


def _said(generated: list[int], finish: dict[str, Any]) -> list[int] | None:
    """Return the tokens of what an answer's text shows, which is not what stopped it.

    None where that was a text: which tokens are its, nobody says.
    """
    matched = finish.get("matched")
    if isinstance(matched, str):
        return None
    return generated[:-1] if matched is not None and generated[-1:] == [matched] else generated


def _payload(body: bytes) -> dict[str, Any] | None:
    """Return a request for one answer to one text; None for any other."""
    try:
        payload = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return None
    if not isinstance(payload, dict) or not isinstance(payload.get("text"), str) or payload.get("stream"):
        return None
    params = payload.get("sampling_params") or {}
    plain = isinstance(params, dict) and params.get("n", 1) == 1 and not params.get("no_stop_trim")
    return payload if plain else None


def _session(scope: Scope, payload: dict[str, Any]) -> str:
    given = next((value for name, value in scope["headers"] if name == b"x-session-id"), None)
    return given.decode("latin-1") if given is not None else str(payload.get("session_id") or "")


def _without_lengths(scope: Scope) -> Scope:
    return {**scope, "headers": [pair for pair in scope["headers"] if pair[0] not in _ABOUT_BODY]}
