"""Chat messages to token ids, once: what a model generated is never turned into text and back.

A conversation is its prompt's ids, the ids of each answer as generated, and between them the ids of what was said to
the model. Only the latter are tokenised, from the text that the chat template puts after an answer.
"""

from __future__ import annotations

import contextlib
import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import jinja2
import msgspec

from miles_api.errors import DataError
from miles_rollout.tokenizers import encode

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["ChatTemplate", "Continuation", "Messages", "Seen", "prompt_ids", "spoken"]

Messages = list[dict[str, Any]]

# Private-use characters, which no template writes.
_ANSWER = "\ue000answer\ue001"
_PLACE = {"role": "assistant", "content": _ANSWER}
_CACHED_TEXT = 256


class Seen(NamedTuple):
    """How a template rendered a conversation up to one answer, and from there to where the next begins."""

    length: int
    digest: int
    """The hash of that many characters: keeping them would take space with the square of the turns."""
    rest: str
    end: str
    """How `rest` begins: with what closes an answer."""

    def begins(self, longer: str, rest: str) -> bool:
        """Say whether `longer`, the same conversation up to the next answer, is rendered alike but for the answer."""
        return (
            len(longer) >= self.length + len(self.rest)
            and longer.endswith(self.rest)
            and rest.startswith(self.end)
            and hash(longer[: self.length]) == self.digest
        )


class Continuation(NamedTuple):
    """What stands between one answer and the next."""

    turn_end: list[int]
    """What closes an answer: `<|im_end|>` and a newline, in ChatML. The model generates part of it itself."""
    opening: list[int]
    """The new messages, up to where the next answer begins."""
    seen: Seen
    """What is known then of the conversation, for the continuation after the next answer."""

    def after(self, generated: list[int]) -> list[int]:
        """Return the ids to append to an answer: all but what the answer ends with already."""
        for size in range(min(len(self.turn_end), len(generated)), 0, -1):
            if generated[-size:] == self.turn_end[:size]:
                return self.turn_end[size:] + self.opening
        return self.turn_end + self.opening


class ChatTemplate:
    """The tokenizer's chat template with its `--apply-chat-template-kwargs` and the tools of one conversation."""

    def __init__(self, tokenizer: Any, kwargs: dict[str, Any], tools: list[dict[str, Any]] | None = None) -> None:
        self._tokenizer = tokenizer
        self.knows_thoughts = "reasoning_content" in str(kwargs.get("chat_template") or tokenizer.chat_template)
        """Whether it shows what an assistant's message has as `reasoning_content`."""
        self._render_with = functools.partial(
            tokenizer.apply_chat_template, tools=tools or None, tokenize=False, **kwargs
        )

    def prompt(self, messages: Messages) -> list[int]:
        """Return the ids of a conversation in which the model speaks next. Raises `DataError`."""
        return self._ids(self._render(messages, answers=True))

    def continuation(self, history: Messages, new: Messages, seen: Seen | None = None) -> Continuation:
        """Return what to append after an answer to `history` so that the model can answer `new`.

        `seen` is that of the continuation which this answer followed; with it, one rendering does for three.

        Raises `DataError` if the template renders what came before differently once more follows: then the ids that
        the model has seen are not those of the conversation, and nothing can be appended to them.
        """
        longer, _, rest = self._split([*history, _PLACE, *new], answers=True)
        end = seen.end if seen is not None and seen.begins(longer, rest) else self._end(history, new, longer, rest)
        return Continuation(self._ids(end), self._ids(rest[len(end) :]), Seen(len(longer), hash(longer), rest, end))

    def _end(self, history: Messages, new: Messages, longer: str, rest: str) -> str:
        """Return what closes an answer to `history`, after checking that `new` leaves what came before as it was."""
        before, _, end = self._split([*history, _PLACE], answers=False)
        past = self._render(history, answers=False)
        if not (before.startswith(past) and longer.startswith(past) and rest.startswith(end)):
            raise DataError(
                "the chat template has no prefix property: it renders earlier messages differently once "
                f"{', '.join(message['role'] for message in new)} follows; a conversation of several turns needs a "
                f"template that only appends. Before: {_tail(before + end)}, after: {_tail(longer + rest[: len(end)])}"
            )
        return end

    def _split(self, messages: Messages, *, answers: bool) -> tuple[str, str, str]:
        text = self._render(messages, answers=answers)
        if text.count(_ANSWER) != 1:
            raise DataError(f"the chat template renders an answer {text.count(_ANSWER)} times instead of once")
        return text.partition(_ANSWER)

    def _render(self, messages: Messages, *, answers: bool) -> str:
        try:
            return self._render_with([_for_template(m) for m in messages], add_generation_prompt=answers)
        except (ValueError, TypeError, KeyError, jinja2.TemplateError) as error:
            roles = ", ".join(str(message.get("role")) for message in messages)
            raise DataError(f"the chat template cannot render messages of {roles}: {error}") from error

    def _ids(self, text: str) -> list[int]:
        if len(text) <= _CACHED_TEXT:
            return list(encode(self._tokenizer, text))
        return self._tokenizer.encode(text, add_special_tokens=False)


def prompt_ids(tokenizer: Any, args: Args, sample: Sample, tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Return the ids of a sample's prompt: chat messages go through the template, text stands for itself.

    Raises `DataError` for a text prompt with tools: they can only be described where the template is applied.
    """
    if not isinstance(sample.prompt, str):
        return ChatTemplate(tokenizer, args.apply_chat_template_kwargs, tools).prompt(sample.prompt)
    if tools:
        raise DataError(
            f"sample {sample.index}: --generate-tool-specs-path describes tools, but the prompt is text and cannot "
            "take them: give chat messages, and leave --apply-chat-template out"
        )
    return list(encode(tokenizer, sample.prompt))


def spoken(tokenizer: Any, ids: list[int]) -> str:
    """Return the text of an answer without what ends it; tags of tool calls may be special tokens, so those stay."""
    end, special = len(ids), tokenizer.all_special_ids
    while end and ids[end - 1] in special:
        end -= 1
    return tokenizer.decode(ids[:end], skip_special_tokens=False)


def _for_template(message: dict[str, Any]) -> dict[str, Any]:
    """Give tool calls their arguments as objects: OpenAI's form has them as JSON text, which templates would quote."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function", call)
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(msgspec.DecodeError):  # then it is the model's own text, to be shown as it is
                function = {**function, "arguments": msgspec.json.decode(function["arguments"])}
        calls.append({**call, "function": function} if "function" in call else function)
    return {**message, "tool_calls": calls}


def _tail(text: str) -> str:
    return repr(text.replace(_ANSWER, "…")[-200:])
