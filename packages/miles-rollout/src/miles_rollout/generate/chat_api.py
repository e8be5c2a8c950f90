"""The OpenAI form of chat completions: what a session accepts, how it answers, and what it refuses.

What would make the samples other than they are recorded is refused, never ignored: a temperature of the agent's own,
say, under which the log-probs would be those of another distribution.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from miles_rollout.generate.message_matching import END_OF_THOUGHT
from miles_rollout.generate.tool_calls import ToolCall, parse_tool_calls

if TYPE_CHECKING:
    from miles_rollout.generate.tool_calls import Parser

__all__ = [
    "ChatRequest",
    "Choice",
    "RequestError",
    "answer_message",
    "as_stream",
    "chat_reply",
    "error_body",
    "models_reply",
    "plain_message",
    "read_request",
]

# They change nothing about what is generated; seeds follow from --rollout-seed, the sample and the turn.
_IGNORED = {
    "metadata", "model", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "seed", "service_tier",
    "store", "stream_options", "user",
}  # fmt: skip
_READ = {"logprobs", "max_completion_tokens", "max_tokens", "messages", "n", "stop", "stream", "tools"}
_SAMPLING = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}
_ONLY: dict[str, Any] = {
    "frequency_penalty": 0, "logit_bias": {}, "presence_penalty": 0, "response_format": {"type": "text"},
    "tool_choice": "auto", "top_logprobs": 0,
}  # fmt: skip
_THOUGHT = "<think>"
_COMPARED = ("role", "content", "reasoning_content", "tool_calls", "tool_call_id", "name")


class RequestError(Exception):
    """A request that is answered with an error; the session is as it was before."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class ChatRequest(msgspec.Struct):
    """One request for a chat completion, checked."""

    messages: list[dict[str, Any]]
    """In the form of `plain_message`."""
    tools: list[dict[str, Any]]
    sampling: dict[str, Any]
    """In SGLang's names, without the length."""
    max_tokens: int | None
    stream: bool
    model: str
    n: int = 1
    """How many answers it asks for."""
    logprobs: bool = False


def read_request(body: bytes, run: dict[str, Any], *, fixed: bool) -> ChatRequest:
    """Read and check a request; with `fixed`, sampling must be that of `run`, whose tokens are trained on.

    Raises `RequestError` with status 400.
    """
    try:
        sent = msgspec.json.decode(body, type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError) as error:
        raise _bad(f"the body is not a JSON object: {error}") from error
    given = {key: value for key, value in sent.items() if value is not None}
    for key, value in given.items():
        if key not in _READ and key not in _IGNORED and key not in _SAMPLING and _ONLY.get(key, msgspec.UNSET) != value:
            allowed = f" other than {_ONLY[key]!r}" if key in _ONLY else ""
            raise _bad(f"{key}{allowed} is not supported by this endpoint")
    sampling = {key: given[key] for key in _SAMPLING if key in given}
    drawn = {**_SAMPLING, **run}
    other = {key: value for key, value in sampling.items() if value != drawn[key]}
    if fixed and other:
        asked = ", ".join(f"{key} {value} instead of {drawn[key]}" for key, value in other.items())
        raise _bad(
            f"training samples are drawn as the run says: {asked}; leave it out, or pass the run's request_kwargs"
        )
    if "stop" in given:
        sampling["stop"] = [*(run.get("stop") or []), *_stops(given["stop"])]
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    return ChatRequest(
        messages=_plain_messages(given.get("messages")),
        tools=_tools(given.get("tools", [])),
        sampling=sampling,
        max_tokens=None if limit is None else _positive("max_tokens", limit),
        stream=bool(given.get("stream")),
        model=str(given.get("model", "")),
        n=_positive("n", given.get("n", 1)),
        logprobs=bool(given.get("logprobs")),
    )


def _tools(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not all(isinstance(tool, dict) for tool in given):
        raise _bad("tools is not a list of tools")
    return given


def _positive(name: str, given: Any) -> int:
    if type(given) is not int or given < 1:
        raise _bad(f"{name} {given!r} is not a positive number")
    return given


def _stops(given: Any) -> list[str]:
    stops = [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise _bad("stop is neither a string nor a list of strings")
    return stops


def _plain_messages(given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise _bad("messages is not a list of at least one message")
    plain = [plain_message(message) for message in given]
    if plain[-1]["role"] == "assistant":
        raise _bad("the last message is the assistant's: an answer cannot be continued")
    return plain


def plain_message(message: Any) -> dict[str, Any]:
    """Reduce a message to what the model sees: clients add empty fields, and write text as parts."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise _bad(f"a message has no role: {message!r:.200}")
    kept = {key: message[key] for key in _COMPARED if message.get(key)}
    content = message.get("content") or ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if not all(isinstance(text, str) for text in texts):
            raise _bad("a message has content that is not text")
        content = "".join(map(str, texts))
    elif not isinstance(content, str):
        raise _bad(f"a message has content that is not text: {content!r:.200}")
    if "tool_calls" in kept:
        if not isinstance(kept["tool_calls"], list):
            raise _bad("tool_calls is not a list")
        kept["tool_calls"] = [_plain_call(call) for call in kept["tool_calls"]]
    return {**kept, "content": content}


def _plain_call(call: Any) -> dict[str, Any]:
    try:
        function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
        return {"id": call.get("id", ""), "type": "function", "function": function}
    except (TypeError, KeyError, AttributeError) as error:
        raise _bad(f"a tool call has no function with name and arguments: {call!r:.200}") from error


class Choice(NamedTuple):
    """One answer, as a request for a completion gets it."""

    message: dict[str, Any]
    finish: str
    """`stop` or `length`."""
    length: int
    """How many tokens it has."""
    tokens: list[str] | None
    """The text of each token, where the request wants log-probs."""
    log_probs: list[float]


def chat_reply(request: ChatRequest, name: str, choices: list[Choice], prompt: int) -> dict[str, Any]:
    """Return the completion `name`, answers to a prompt of so many tokens."""
    generated = sum(choice.length for choice in choices)
    return {
        "id": name,
        "object": "chat.completion",
        "created": int(time.time()),
        "model": request.model,
        "choices": [_choice(index, choice) for index, choice in enumerate(choices)],
        "usage": {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated},
    }


def _choice(index: int, choice: Choice) -> dict[str, Any]:
    finish, log_probs = choice.finish, None
    if finish == "stop" and "tool_calls" in choice.message:
        finish = "tool_calls"
    if choice.tokens is not None:
        pairs = zip(choice.tokens, choice.log_probs, strict=True)
        content = [
            {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []} for text, value in pairs
        ]
        log_probs = {"content": content, "refusal": None}
    return {"index": index, "message": choice.message, "finish_reason": finish, "logprobs": log_probs}


def models_reply(checkpoint: str) -> dict[str, Any]:
    """Return the list of models: the one that is trained, by the name that `request_kwargs` has."""
    model = {"id": Path(checkpoint).name, "object": "model", "created": 0, "owned_by": "miles"}
    return {"object": "list", "data": [model]}


def answer_message(
    number: int, text: str, spoken: str, *, parser: Parser | None, tools: list[dict[str, Any]], thoughts: bool
) -> dict[str, Any]:
    """Return an answer as a message: with a `parser`, what `spoken` calls becomes tool calls, unless one is malformed.

    `text` is the answer for people, `spoken` the same with the special tokens that may mark a call. With `thoughts`,
    what comes before the answer proper stands in `reasoning_content`, for a template that knows it; else in the text.
    """
    content, calls = parse_tool_calls(spoken, parser, tools) if parser else (text, [])
    good = [call for call in calls if isinstance(call, ToolCall)]
    called = good and len(good) == len(calls)
    message = _with_thought(content if called else text, split=thoughts)
    if called:
        message["tool_calls"] = [_openai_call(number, position, call) for position, call in enumerate(good)]
    return message


def _with_thought(text: str, *, split: bool) -> dict[str, Any]:
    thought, end, rest = text.rpartition(END_OF_THOUGHT)
    if not (split and end):
        return {"role": "assistant", "content": text}
    thought = thought.strip().removeprefix(_THOUGHT).strip()
    return {"role": "assistant", "content": rest.lstrip("\n"), "reasoning_content": thought}


def _openai_call(turn: int, number: int, call: ToolCall) -> dict[str, Any]:
    arguments = msgspec.json.encode(call.arguments).decode()
    function = {"name": call.name, "arguments": arguments}
    return {"id": f"call_{turn}_{number}", "type": "function", "function": function}


def as_stream(reply: dict[str, Any]) -> bytes:
    """Return a whole completion as server-sent events: one chunk, then the end."""
    choices = [{**choice, "delta": _delta(choice["message"])} for choice in reply["choices"]]
    for choice in choices:
        del choice["message"]
    chunk = {**reply, "object": "chat.completion.chunk", "choices": choices}
    return b"data: " + msgspec.json.encode(chunk) + b"\n\ndata: [DONE]\n\n"


def _delta(message: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    return {**message, "tool_calls": [{"index": i, **call} for i, call in enumerate(message["tool_calls"])]}


def error_body(error: RequestError) -> dict[str, Any]:
    """Return the error as OpenAI's clients read it."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"  # noqa: PLR2004
    return {"error": {"message": str(error), "type": kind, "param": None, "code": error.code}}


def _bad(message: str) -> RequestError:
    return RequestError(400, "invalid_request", message)
