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
from array import array
from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Annotated, Any

import msgspec

from miles_api.errors import HookError
from miles_api.options import Options, options_from
from miles_router.messages import CHOSEN
from miles_router.middlewares.bodies import WholeAnswer, generate_body, giving, question, with_own_body

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_router.handle import RouterHandle
    from miles_router.messages import Receive, Scope, Send
    from miles_router.middleware import App

__all__ = ["TEXT_COST", "Known", "PrefixTokens", "PrefixTokensOptions", "Texts"]

_BLOCK = 64
"""Characters that are hashed at once to find the longest known beginning of a text."""
TEXT_COST = 64
"""What a remembered text counts beside its tokens, each of which takes four bytes."""
_START, _END = "a", "\na"
"""A text in two parts that no tokenizer joins, to try one with: a letter and the end of its line have no token."""
_MOST_CHOICES = 256
_OK, _NOT_FOUND = 200, 404
_OTHER_INPUT = ("input_ids", "input_embeds")
_Token = Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]


class PrefixTokensOptions(Options, frozen=True, kw_only=True):
    """How much is remembered of conversations."""

    prefix_tokens_kept: Annotated[int, msgspec.Meta(ge=1)] = 16 << 20
    """Tokens that are remembered, of four bytes, and 64 for each text beside; beyond, the text unused for longest is
    forgotten, and tokenised anew."""


class _Tokenised(msgspec.Struct):
    tokens: list[_Token]


class _Reply(msgspec.Struct):
    text: str
    output_ids: list[_Token]
    meta_info: dict[str, Any]


class _NotToldError(Exception):
    """No engine was there to ask, or the one that was asked died: `answer` is what the client gets."""

    def __init__(self, answer: WholeAnswer) -> None:
        super().__init__(f"/tokenize answered {answer.status}")
        self.answer = answer


class Known(msgspec.Struct):
    """A text that is remembered: how many characters and which tokens."""

    length: int
    tokens: array[int]


class Texts:
    """Texts with their tokens; finds the longest that another text begins with.

    A text is known by the hash of its whole blocks and what is left of it, so that finding one looks up a few keys,
    however many there are.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.size = 0
        """Tokens that are remembered, and `TEXT_COST` for each text."""
        self._known: OrderedDict[tuple[bytes, str], Known] = OrderedDict()
        self._blocks: Counter[bytes] = Counter()

    def add(self, session: str, text: str, tokens: array[int]) -> None:
        """Remember a text; one that is known already gets other tokens."""
        *_, (blocks, end) = _beginnings(session, text)
        key = blocks, text[end:]
        if key in self._known:
            self._forget(key)
        self._known[key] = Known(len(text), tokens)
        self._blocks[blocks] += 1
        self.size += len(tokens) + TEXT_COST
        while self.size > self._most:
            self._forget(next(iter(self._known)))

    def find(self, session: str, text: str) -> Known | None:
        """Return the longest text that this one begins with."""
        for blocks, end in reversed(list(_beginnings(session, text))):
            if blocks not in self._blocks:
                continue
            rest = text[end : end + _BLOCK - 1]
            for size in range(len(rest), -1, -1):
                key = blocks, rest[:size]
                if (known := self._known.get(key)) is not None:
                    self._known.move_to_end(key)
                    return known
        return None

    def _forget(self, key: tuple[bytes, str]) -> None:
        self.size -= len(self._known.pop(key).tokens) + TEXT_COST
        self._blocks[key[0]] -= 1
        if not self._blocks[key[0]]:
            del self._blocks[key[0]]


def _beginnings(session: str, text: str) -> Iterator[tuple[bytes, int]]:
    """Yield hash and length of a text's first 0, 1, 2, … whole blocks."""
    digest = hashlib.blake2b(session.encode("utf-8", "surrogatepass"), digest_size=16)
    yield digest.digest(), 0
    for end in range(_BLOCK, len(text) + 1, _BLOCK):
        digest.update(text[end - _BLOCK : end].encode("utf-8", "surrogatepass"))
        yield digest.digest(), end


class PrefixTokens:
    """Sends `input_ids` in the place of a `text`.

    What has no text, several, images or the like beside it, or asks for a stream passes through; so does everything
    where a text's end has other tokens than alone, as with SentencePiece.
    """

    options = PrefixTokensOptions
    changes_tokens = True

    def __init__(self, app: App, *, router: RouterHandle) -> None:
        mine: PrefixTokensOptions = options_from(router.args, PrefixTokensOptions)
        self._app = app
        self._max_body = router.options.router_max_body_bytes
        self._texts = Texts(mine.prefix_tokens_kept)
        self._divisible: dict[frozenset[str] | None, bool] = {}
        self._continued = self._begun = self._passed = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Replace the text of a request, and remember what is answered."""
        body = await generate_body(self._app, scope, receive, send, self._max_body)
        if body is None:
            return
        payload = _payload(body)
        try:
            divisible = payload is not None and await self._divides(scope)
            if payload is None or not divisible:
                self._passed += 1
                await self._app(scope, giving(body, receive), send)
                return
            session, text = _session(scope, payload), payload.pop("text")
            tokens = await self._tokens(scope, session, text)
        except _NotToldError as error:
            await error.answer.give(send)
            return
        answer = WholeAnswer()
        sent = msgspec.json.encode({**payload, "input_ids": tokens.tolist()})
        await self._app(with_own_body(scope), giving(sent, receive), answer.take)
        self._note(answer, session, text, tokens)
        await answer.give(send)

    def counts(self) -> dict[str, int]:
        """Say how many texts went on from a known one, began anew and passed as they are, and what is remembered."""
        asked = {"continued": self._continued, "begun": self._begun, "passed": self._passed}
        return {**asked, "tokens": self._texts.size}

    async def _divides(self, scope: Scope) -> bool:
        """Tell whether the end of a text has the tokens that it has alone; SentencePiece puts a space before each."""
        chosen = scope.get(CHOSEN)
        if chosen not in self._divisible:
            alone = await self._tokenise(scope, _END, special=False)
            whole = await self._tokenise(scope, _START + _END, special=False)
            if len(self._divisible) >= _MOST_CHOICES:
                self._divisible.clear()
            self._divisible[chosen] = whole[-len(alone) :] == alone
        return self._divisible[chosen]

    async def _tokens(self, scope: Scope, session: str, text: str) -> array[int]:
        known = self._texts.find(session, text)
        if known is None:
            self._begun += 1
            return await self._tokenise(scope, text, special=True)
        self._continued += 1
        rest = text[known.length :]
        return known.tokens + await self._tokenise(scope, rest, special=False) if rest else known.tokens

    async def _tokenise(self, scope: Scope, text: str, *, special: bool) -> array[int]:
        """Ask an engine. Raises `HookError` if it cannot say, `_NotToldError` if it was not to be had."""
        body = msgspec.json.encode({"model": "default", "prompt": text, "add_special_tokens": special})
        answer = WholeAnswer()
        await self._app(question(scope, "POST", "/tokenize"), giving(body), answer.take)
        if not answer.complete or answer.status not in (_OK, _NOT_FOUND):
            raise _NotToldError(answer)
        try:
            said = msgspec.json.decode(answer.body, type=_Tokenised).tokens if answer.status == _OK else None
            return array("i", msgspec.convert(said, list[_Token]))
        except msgspec.MsgspecError as error:
            raise HookError(
                f"prefix_tokens needs the engines' /tokenize, which answered {answer.status}: {answer.body[:200]!r}"
            ) from error

    def _note(self, answer: WholeAnswer, session: str, text: str, tokens: array[int]) -> None:
        """Remember the tokens of text and answer, and say in the answer those of the prompt."""
        if answer.status != _OK or not answer.complete:
            return
        try:
            reply: Any = msgspec.json.decode(answer.body)
            said = msgspec.convert(reply, _Reply)
        except msgspec.MsgspecError:
            return
        kept = _said(said.output_ids, said.meta_info.get("finish_reason") or {})
        if kept is not None:
            self._texts.add(session, text + said.text, tokens + array("i", kept))
        reply["meta_info"]["prompt_token_ids"] = tokens.tolist()
        answer.replace(msgspec.json.encode(reply))


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
    if any(value is not None and (key in _OTHER_INPUT or key.endswith("_data")) for key, value in payload.items()):
        return None
    params = payload.get("sampling_params") or {}
    plain = isinstance(params, dict) and params.get("n", 1) == 1 and not params.get("no_stop_trim")
    return payload if plain else None


def _session(scope: Scope, payload: dict[str, Any]) -> str:
    """Return what tells texts apart: the session, and the engines that middleware chose, which have their own model."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-session-id"), None)
    session = str(payload.get("session_id") or "") if given is None else given
    return session if scope.get(CHOSEN) is None else "\0".join((session, *sorted(scope[CHOSEN])))
