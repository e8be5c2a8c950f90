"""The conversations that one agent holds over HTTP, recorded as the tokens the model saw and generated."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from typing import TYPE_CHECKING, Any, NoReturn

from miles_api.errors import ConfigError, DataError, ServiceError
from miles_api.options import options_from
from miles_api.sample import Status
from miles_rollout.generate.chat import ChatTemplate, spoken
from miles_rollout.generate.chat_api import (
    ChatRequest,
    Choice,
    RequestError,
    answer_message,
    chat_reply,
    models_reply,
    plain_message,
    read_request,
)
from miles_rollout.generate.options import GenerateOptions
from miles_rollout.generate.stopwatch import Stopwatch
from miles_rollout.generate.tool_parsers import parser_for
from miles_rollout.generate.turn import Answer, ask
from miles_rollout.generate.turn_tree import Turn, TurnTree
from miles_rollout.group import gather

if TYPE_CHECKING:
    from miles_api.rollout_types import GenerateFnInput
    from miles_rollout.generate.tool_calls import Parser

__all__ = ["Session"]

_SHOWN = 200
_AT_ONCE = 16
"""How many answers of one session the engines work on at once; more wait."""


class Session:
    """Answers one agent's requests, also several at once, and keeps what was said as a tree of turns.

    A request that repeats a recorded conversation and adds to it continues there: the ids of what was generated are
    kept, only what is new is tokenised. Any other begins a conversation of its own.
    """

    def __init__(self, request: GenerateFnInput) -> None:
        self.id = secrets.token_urlsafe(24)
        """Whoever knows it may use the session."""
        self.error: Exception | None = None
        """What an engine failed with at last, or this session; None once a later request went well."""
        self.aborted = False
        """Whether a request came to nothing because the rollout was over."""
        self.at_engines = Stopwatch()
        """How long engines worked for it, once where they did so for several requests."""
        self.turns = 0
        """How many answers were given."""
        self._request = request
        self._options: GenerateOptions = options_from(request.args, GenerateOptions)
        self._tree = TurnTree(tolerant=self._options.agent_message_matching == "tolerant")
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._number = self._under_way = 0
        self._closed = ""

    def leaves(self) -> list[Turn]:
        """Return the last turn of each conversation."""
        return self._tree.leaves()

    async def complete(self, body: bytes) -> tuple[ChatRequest, dict[str, Any]]:
        """Answer one request for a chat completion. Raises `RequestError`; then nothing was recorded.

        Cancelled, as when the client hangs up, it gives up and records nothing.
        """
        task = asyncio.ensure_future(self._complete(body))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        try:
            return await task
        except asyncio.CancelledError:
            if self._closed:
                raise self._gone() from None
            raise
        except RequestError:
            raise
        except Exception as error:
            # The agent's client would hide where it comes from.
            self.error = error
            raise RequestError(500, "internal", repr(error)) from error

    def models(self) -> dict[str, Any]:
        """Return the list of models: the one that is trained."""
        return models_reply(self._request.args.hf_checkpoint)

    def close(self, reason: str) -> None:
        """Answer nothing any more; a request under way is given up, so that its engine is free."""
        self._closed = reason
        for task in self._tasks:
            task.cancel()

    async def _complete(self, body: bytes) -> tuple[ChatRequest, dict[str, Any]]:
        request = self._request
        chat = read_request(body, request.sampling_params, fixed=not request.evaluation)
        if self._closed:
            raise self._gone()
        self._parser(chat)
        if chat.n > self._options.agent_max_samples:
            raise self._too_many(chat)
        parent = self._find(chat)
        if request.state.aborted:
            self._abort(parent)
        try:
            template = ChatTemplate(request.state.tokenizer, request.args.apply_chat_template_kwargs, chat.tools)
            turns = self._turns(chat, template, parent)
            left = self._room(turns[0])
        except DataError as error:
            raise RequestError(400, "chat_template", str(error)) from error
        if left == 0:
            return chat, self._full(chat, turns[0])
        self._begin(chat, turns)
        answers = await self._answers(chat, turns, min(left, chat.max_tokens or left))
        try:
            return chat, self._reply(chat, template, turns, answers)
        except RequestError:
            raise
        except Exception:
            self._drop(turns)
            raise

    def _parser(self, chat: ChatRequest) -> Parser | None:
        """Return what reads the calls of a request's tools. Raises `RequestError` where the model's form is unknown."""
        try:
            return parser_for(self._request.args, self._request.state.tokenizer) if chat.tools else None
        except ConfigError as error:
            raise RequestError(400, "tools", str(error)) from error

    def _find(self, chat: ChatRequest) -> Turn | None:
        """Return the turn that a request continues, and note which of its messages it writes in another way."""
        found = self._tree.find(chat.messages, chat.tools)
        position = 0
        for turn in found.path() if found is not None else ():
            for number, message in enumerate(turn.recorded()):
                if message != chat.messages[position]:
                    turn.rewritten.add(number)
                position += 1
        return found

    def _turns(self, chat: ChatRequest, template: ChatTemplate, parent: Turn | None) -> list[Turn]:
        """Return the turns of a request, after `parent` unless the template cannot append to it."""
        if parent is not None and parent.answer is not None:
            history = parent.messages()
            said = chat.messages[len(history) :]
            with contextlib.suppress(DataError):
                more = template.continuation(history[:-1], said, parent.seen)
                shown = more.after(parent.answer.ids)
                return [Turn(parent, said, shown, chat.tools, more.seen) for _ in range(chat.n)]
        shown = template.prompt(chat.messages)
        return [Turn(None, chat.messages, shown, chat.tools) for _ in range(chat.n)]

    def _room(self, turn: Turn) -> int:
        """Return how many tokens the answer may have. Raises `DataError` for a prompt that is too long by itself."""
        request, context = self._request, self._request.args.rollout_max_context_len
        left = request.sampling_params["max_new_tokens"] - (turn.start - turn.prompt_length)
        if context is None:
            return max(left, 0)
        if turn.prompt_length > context:
            raise DataError(
                f"sample {request.sample.index}: its prompt has {turn.prompt_length} tokens, more than "
                f"--rollout-max-context-len {context}; filter with --rollout-max-prompt-len"
            )
        return max(min(left, context - turn.start), 0)

    def _begin(self, chat: ChatRequest, turns: list[Turn]) -> None:
        """Put the turns of a request into the tree, within the limits. Raises `RequestError`."""
        parent = turns[0].parent
        self._require_turns(len(turns), parent)
        continued = parent is not None and not parent.children
        if self._tree.ends() + len(turns) - continued > self._options.agent_max_samples:
            raise self._too_many(chat)
        name = f"chatcmpl-{self._number + 1}"
        for choice, turn in enumerate(turns):
            self._number += 1
            turn.names = (f"{name}/{choice}", name)
            self._tree.add(turn, self._number)

    def _require_turns(self, count: int, parent: Turn | None) -> None:
        """Raise `RequestError` if so many more answers are too many; the conversation then ends at `parent`."""
        most = self._options.agent_max_turns
        if self.turns + self._under_way + count > most:
            if parent is not None:
                parent.cut = Status.TRUNCATED
            raise RequestError(409, "limit", f"--agent-max-turns {most} answers were given")

    def _too_many(self, chat: ChatRequest) -> RequestError:
        most = self._options.agent_max_samples
        position, recorded = self._tree.nearest(chat.messages)
        if chat.n > 1:
            problem = f"n {chat.n} asks for as many conversations"
        elif not 0 <= position < len(recorded):
            problem = (
                "all messages are recorded, but nothing is new, the tools are others, or the template rewrites them"
            )
        else:
            problem = (
                f"message {position} is not as this session recorded it: sent {chat.messages[position]!r:.{_SHOWN}}, "
                f"recorded {recorded[position]!r:.{_SHOWN}}"
            )
        return RequestError(
            409,
            "history",
            f"{problem}. A request that does not repeat a recorded conversation unchanged, answers included, begins "
            f"another, and a session may have --agent-max-samples {most} of them. For a client that writes its history "
            "anew there is --agent-message-matching tolerant",
        )

    async def _answers(self, chat: ChatRequest, turns: list[Turn], limit: int) -> list[Answer]:
        self._under_way += len(turns)
        try:
            with self.at_engines.running():
                answers = await gather(*(self._ask(chat, turn, limit) for turn in turns))
        except BaseException as error:
            self._drop(turns)
            if isinstance(error, ServiceError):
                self.error = error
                raise RequestError(502, "engine", str(error)) from error
            raise
        finally:
            self._under_way -= len(turns)
        self.error = None
        return answers

    def _drop(self, turns: list[Turn]) -> None:
        """Forget the turns of a request that came to nothing."""
        for turn in turns:
            self._tree.remove(turn)

    async def _ask(self, chat: ChatRequest, turn: Turn, limit: int) -> Answer:
        ids = [*(turn.parent.ids() if turn.parent else ()), *turn.shown]
        async with self._gate:
            return await ask(self._request, ids, limit, int.from_bytes(turn.key), **chat.sampling)

    def _reply(
        self, chat: ChatRequest, template: ChatTemplate, turns: list[Turn], answers: list[Answer]
    ) -> dict[str, Any]:
        choices = [self._choice(chat, template, *pair) for pair in zip(turns, answers, strict=True)]
        if any(answer.meta["finish_reason"]["type"] == "abort" for answer in answers):
            self._abort(None)
        return chat_reply(chat, turns[0].names[-1], choices, turns[0].start)

    def _choice(self, chat: ChatRequest, template: ChatTemplate, turn: Turn, answer: Answer) -> Choice:
        """Record an answer and return it as the client gets it."""
        tokenizer = self._request.state.tokenizer
        loud = spoken(tokenizer, answer.ids) if chat.tools else ""
        message = answer_message(
            turn.number, answer.text, loud, parser=self._parser(chat), tools=chat.tools,
            thoughts=template.knows_thoughts,
        )  # fmt: skip
        turn.answer, turn.message = answer, plain_message(message)
        self.turns += 1
        said = [tokenizer.decode([token]) for token in answer.ids] if chat.logprobs else None
        finish = "stop" if answer.meta["finish_reason"]["type"] == "stop" else "length"
        return Choice(message, finish, len(answer.ids), said, answer.log_probs)

    def _full(self, chat: ChatRequest, turn: Turn) -> dict[str, Any]:
        """Answer that there is no room for one more token, as an answer that was cut off before its first."""
        message = {"role": "assistant", "content": ""}
        if turn.parent is None:
            self._begin(chat, [turn])
            turn.answer, turn.message = Answer([], [], "", {"finish_reason": {"type": "length"}}), message
            name = turn.names[-1]
        else:
            self._require_turns(1, turn.parent)
            turn.parent.cut = Status.TRUNCATED
            name = turn.parent.names[-1]
        self.turns += 1
        choice = Choice(message, "length", 0, [] if chat.logprobs else None, [])
        return chat_reply(chat, name, [choice] * chat.n, turn.start)

    def _abort(self, parent: Turn | None) -> NoReturn:
        """Refuse to go on, as the rollout is over; the conversation so far is kept as aborted."""
        self.aborted = True
        if parent is not None:
            parent.cut = Status.ABORTED
        raise RequestError(503, "aborted", "the rollout was aborted: no more is generated")

    def _gone(self) -> RequestError:
        return RequestError(410, "session_closed", f"this session is closed: {self._closed}")
