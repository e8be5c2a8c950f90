"""Tool calls in the text of an answer, in the form of Hermes and Qwen: `<tool_call>{"name", "arguments"}</tool_call>`.

Parsers of other model families return the same types.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

__all__ = ["BadToolCall", "ToolCall", "parse_tool_calls"]

# A call that the end of the answer cuts off counts if its JSON is whole.
_CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
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


def parse_tool_calls(text: str) -> tuple[str, list[ToolCall | BadToolCall]]:
    """Return the text before the first call, and the calls in order; a call in a thought is none."""
    spoken = text.rpartition(_END_OF_THOUGHT)[2]
    calls = [_parse(match[1]) for match in _CALL.finditer(spoken)]
    if not calls:
        return text, []
    return text[: len(text) - len(spoken) + spoken.index("<tool_call>")].rstrip(), calls


def _parse(text: str) -> ToolCall | BadToolCall:
    try:
        return msgspec.json.decode(text.strip(), type=ToolCall)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        return BadToolCall(text.strip(), f'not a JSON object with "name" and "arguments": {error}')
