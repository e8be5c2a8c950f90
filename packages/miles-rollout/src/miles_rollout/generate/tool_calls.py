"""Tool calls in the text of an answer: what every parser returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

__all__ = ["BadToolCall", "Calls", "Parser", "ToolCall", "parse_tool_calls"]

_END_OF_THOUGHT = "</think>"


class ToolCall(msgspec.Struct, frozen=True):
    """One call that the model makes."""

    name: str
    arguments: dict[str, Any] = {}


class BadToolCall(msgspec.Struct, frozen=True):
    """Something that begins like a call and is none."""

    text: str
    problem: str
    """In words, for the model."""


Calls = list[ToolCall | BadToolCall]
Parser = Callable[[str, Sequence[dict[str, Any]]], tuple[str, Calls]]
"""Takes the text of an answer without its thought, and the tool specifications, whose types turn `<a>7</a>` into 7;
returns the text before the first call, and the calls in order."""


def parse_tool_calls(text: str, parser: Parser, tools: Sequence[dict[str, Any]] = ()) -> tuple[str, Calls]:
    """Return the text before the first call, and the calls in order; a call in a thought is none."""
    spoken = text.rpartition(_END_OF_THOUGHT)[2]
    before, calls = parser(spoken, tools)
    if not calls:
        return text, []
    return (text[: len(text) - len(spoken)] + before).rstrip(), [_writable(call) for call in calls]


def _writable(call: ToolCall | BadToolCall) -> ToolCall | BadToolCall:
    """Return a call that can be passed on: not one with half a character, or with a value that JSON does not know."""
    if isinstance(call, ToolCall):
        try:
            msgspec.json.encode(call)
        except (ValueError, TypeError, RecursionError) as error:
            return BadToolCall(ascii(call.name), f"not text and JSON values: {error}")
    return call
