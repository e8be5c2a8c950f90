"""Calls read by transformers, from a response template: ours for a family, or the tokenizer's own."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_rollout.generate.tool_calls import Calls

__all__ = ["DeclaredParser"]

_CALLS = "tool_calls"


class DeclaredParser:
    """Parses with one response template; `ConfigError` if transformers does not take it."""

    def __init__(self, template: dict[str, Any]) -> None:
        # transformers takes seconds to import, and only a run that uses tools needs this of it.
        self._library = importlib.import_module("transformers.utils.chat_parsing.response_parser")
        try:
            self._template = self._library.load_response_template(template)
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"the tokenizer's response_template is not one: {error}; name a --generate-tool-call-parser"
            ) from error

    def __call__(self, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, Calls]:
        """Return the text before the first call, and the calls."""
        events: list[dict[str, Any]] = []
        parser = self._library.ResponseParser(self._template, prefix="", tools=list(tools))
        try:
            events += parser.feed(text)
            events += parser.finalize()[1]
        except (ValueError, KeyError, RecursionError) as error:
            return "", [BadToolCall(text, str(error))]
        before, calls = "", []
        for event in events:
            if event["field"].startswith(_CALLS):
                if event["type"] == "region_close":
                    value = event["value"]
                    calls += [_call(one) for one in (value if isinstance(value, list) else [value])]
            elif event["type"] == "region_chunk" and not calls:
                before += event["text"]
        return before, calls


def _call(value: Any) -> ToolCall | BadToolCall:
    function = value.get("function", value) if isinstance(value, dict) else value
    if isinstance(function, dict):
        name, given = function.get("name"), function.get("arguments", function.get("parameters", {}))
        if isinstance(given, str):
            return _bad(given)
        function = {"name": name.strip() if isinstance(name, str) else name, "arguments": given}
    elif isinstance(function, str):
        return _bad(function)
    try:
        return msgspec.convert(function, ToolCall)
    except msgspec.ValidationError as error:
        return BadToolCall(f"{function}", f'not an object with "name" and "arguments": {error}')


def _bad(text: str) -> BadToolCall:
    """Return what is no JSON, with where it stops being some."""
    try:
        problem = f"a {type(msgspec.json.decode(text)).__name__}"
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError) as error:
        problem = str(error)
    return BadToolCall(text, f"not a JSON object: {problem}")
