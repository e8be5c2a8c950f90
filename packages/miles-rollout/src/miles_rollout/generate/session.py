"""One conversation that an agent drives over HTTP, recorded as the tokens the model saw and generated."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING, Any

from miles_api.errors import DataError, ServiceError
from miles_api.sample import Status
from miles_rollout.generate.chat import ChatTemplate, spoken
from miles_rollout.generate.chat_api import (
    ChatRequest,
    RequestError,
    answer_message,
    chat_reply,
    plain_message,
    read_request,
)
from miles_rollout.generate.turn import ask, room

if TYPE_CHECKING:
    from miles_api.rollout_types import GenerateFnInput

__all__ = ["Session"]

_SHOWN = 200


class Session:
    """Answers one agent's requests, one at a time, and appends what is said to the sample.

    The first request gives the prompt. Each later one has to repeat the conversation as it was and add to it: the ids
    of what was generated are kept, only what is new is tokenised, and it is left out of the loss.
    """

    def __init__(self, request: GenerateFnInput) -> None:
        self.id = secrets.token_urlsafe(24)
        """Whoever knows it may use the session."""
        self.turns = 0
        self.engine_seconds = 0.0
        self.error: ServiceError | None = None
        """What an engine failed with at last; None once a later request went well."""
        self._request = request
        self._lock = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._said: list[dict[str, Any]] = []
        self._tools: list[dict[str, Any]] = []
        self._template: ChatTemplate | None = None
        self._last: list[int] = []
        self._closed = ""

    async def complete(self, body: bytes) -> tuple[ChatRequest, dict[str, Any]]:
        """Answer one request for a chat completion. Raises `RequestError`; then nothing was recorded."""
        task = asyncio.ensure_future(self._complete(body))
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        try:
            # Shielded: a client that hangs up leaves a conversation that is still whole.
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if self._closed and task.cancelled():
                raise self._gone() from None
            raise

    def _finished(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # looked at: a client that hung up does not ask for it

    def close(self, reason: str) -> None:
        """Answer nothing any more; a request under way is given up, so that its engine is free."""
        self._closed = reason
        for task in self._tasks:
            task.cancel()

    async def _complete(self, body: bytes) -> tuple[ChatRequest, dict[str, Any]]:
        request = self._request
        chat = read_request(body, request.sampling_params, fixed=not request.evaluation)
        async with self._lock:
            if self._closed:
                raise self._gone()
            try:
                pending = self._pending(chat)
                left = room(request, len(pending))
            except DataError as error:
                raise RequestError(400, "chat_template", str(error)) from error
            if left == 0:
                return chat, self._full(chat)
            return chat, await self._answer(chat, pending, min(left, chat.max_tokens or left))

    def _pending(self, chat: ChatRequest) -> list[int]:
        """Return the ids of what is new in a request, after checking that the rest is as recorded."""
        if self._template is None or not self._said:
            kwargs = self._request.args.apply_chat_template_kwargs
            self._tools, self._template = chat.tools, ChatTemplate(self._request.state.tokenizer, kwargs, chat.tools)
            self._request.sample.tokens = self._template.prompt(chat.messages)
            return []
        self._require_same(chat)
        new = chat.messages[len(self._said) :]
        return self._template.continuation(self._said[:-1], new).after(self._last)

    def _full(self, chat: ChatRequest) -> dict[str, Any]:
        """Answer that there is no room for one more token, as an answer that was cut off before its first."""
        sample = self._request.sample
        sample.append_response_tokens([], log_probs=[])
        sample.status = Status.TRUNCATED
        self.turns += 1
        return chat_reply(chat, self.turns, {"role": "assistant", "content": ""}, "length", (len(sample.tokens), 0))

    def _require_same(self, chat: ChatRequest) -> None:
        if chat.tools != self._tools:
            raise _conflict("the tools are not those of the first request: they are part of the prompt")
        for number, (recorded, sent) in enumerate(zip(self._said, chat.messages, strict=False)):
            if recorded != sent:
                raise _conflict(
                    f"message {number} is not as this session recorded it: sent {sent!r:.{_SHOWN}}, recorded "
                    f"{recorded!r:.{_SHOWN}}"
                )
        if len(chat.messages) <= len(self._said):
            raise _conflict(f"{len(chat.messages)} messages sent, {len(self._said)} recorded, none is new")

    async def _answer(self, chat: ChatRequest, pending: list[int], limit: int) -> dict[str, Any]:
        request, sample = self._request, self._request.sample
        started = time.perf_counter()
        try:
            answer = await ask(request, sample.tokens + pending, limit, self.turns, **chat.sampling)
        except ServiceError as error:
            self.error = error
            raise RequestError(502, "engine", str(error)) from error
        finally:
            self.engine_seconds += time.perf_counter() - started
        self.error = None
        if pending:
            skip = request.sampling_params.get("skip_special_tokens", True)
            text = request.state.tokenizer.decode(pending, skip_special_tokens=skip)
            sample.append_response_tokens(pending, text=text, trainable=False)
        prompt = len(sample.tokens)
        answer.append_to(sample)
        self.turns += 1
        finish = "stop" if sample.status is Status.COMPLETED else "length"
        loud = spoken(request.state.tokenizer, answer.ids)
        message = answer_message(self.turns, answer.text, loud, tools=bool(chat.tools))
        self._last = answer.ids
        self._said = [*chat.messages, plain_message(message)]
        return chat_reply(chat, self.turns, message, finish, (prompt, len(answer.ids)))

    def _gone(self) -> RequestError:
        return RequestError(410, "session_closed", f"this session is closed: {self._closed}")


def _conflict(problem: str) -> RequestError:
    return RequestError(
        409,
        "history",
        f"{problem}. A session's conversation only grows: send all of its messages unchanged, answers included, and "
        "new ones after them",
    )
