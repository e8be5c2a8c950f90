"""When does a client's account of a conversation stand for the recorded one?"""

from __future__ import annotations

from typing import Any

import msgspec

__all__ = ["END_OF_THOUGHT", "same", "similar"]

END_OF_THOUGHT = "</think>"

Message = dict[str, Any]


def same(recorded: Message, sent: Message) -> bool:
    """Say whether two messages in the form of `plain_message` are equal: `--agent-message-matching exact`."""
    return recorded == sent


def similar(recorded: Message, sent: Message) -> bool:
    """Say whether `sent` is `recorded` as a client may have written it anew: `--agent-message-matching tolerant`.

    White space around the text does not count, nor do the order and spacing of the arguments of a tool call, the ids of
    calls, a name that was left out, thoughts, and text that was left out beside calls.
    """
    if recorded == sent:
        return True
    named = recorded["role"] != "tool" and "name" in sent
    if recorded["role"] != sent["role"] or (named and sent["name"] != recorded.get("name")):
        return False
    calls, text = _calls(recorded), _text(sent)
    return calls == _calls(sent) and (text == _text(recorded) or bool(calls and not text))


def _text(message: Message) -> str:
    text = message["content"]
    return (text.rpartition(END_OF_THOUGHT)[2] if message["role"] == "assistant" else text).strip()


def _calls(message: Message) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in message.get("tool_calls", ())]
    return [(function["name"], _value(function["arguments"])) for function in functions]


def _value(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        return msgspec.json.decode(arguments)
    except msgspec.DecodeError:
        return arguments.strip()
