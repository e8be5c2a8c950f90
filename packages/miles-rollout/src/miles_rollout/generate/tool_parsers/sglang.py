"""SGLang's own parsers, where SGLang is installed: for families that we have no format of."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_rollout.generate.tool_calls import Calls, Parser

__all__ = ["sglang_parser"]


def sglang_parser(name: str) -> Parser | None:
    """Return SGLang's parser of this name; None where SGLang is not installed. `ConfigError` if it has none of it."""
    if importlib.util.find_spec("sglang") is None:
        return None
    library = importlib.import_module("sglang.srt.function_call.function_call_parser")
    names = library.FunctionCallParser.ToolCallParserEnum
    if name not in names:
        raise ConfigError(f"--generate-tool-call-parser {name}: SGLang has {', '.join(sorted(names))}")
    return functools.partial(_parse, library.FunctionCallParser, library.Tool, name)


def _parse(library: Any, tool: Any, name: str, text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, Calls]:
    # A parser of its own each time: they keep what a stream has left.
    parser = library([tool.model_validate(spec) for spec in tools], name)
    before, items = parser.parse_non_stream(text)
    if not items and parser.has_tool_call(text):
        return before, [BadToolCall(text, "it does not parse")]
    return before, [_call(item.name, item.parameters) for item in items]


def _call(name: str, arguments: str) -> ToolCall | BadToolCall:
    try:
        return ToolCall(name, msgspec.json.decode(arguments or "{}", type=dict[str, Any]))
    except msgspec.DecodeError as error:
        return BadToolCall(arguments, f"the arguments of {name} are not a JSON object: {error}")
