"""Calls written as Python, `[add(a=1, b=2), now()]`: Llama 4, Llama 3.2's small models, ToolACE."""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from miles_rollout.generate.tool_calls import BadToolCall, ToolCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_rollout.generate.tool_calls import Calls

__all__ = ["pythonic"]

_LIST = re.compile(r"(?:<\|python_start\|>)?\s*(\[\s*[A-Za-z_][\w.]*\(.*)", re.DOTALL)
_END = "<|python_end|>"


def pythonic(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, Calls]:
    """Read an answer that is a list of calls with keyword arguments; text with a list in it is just text."""
    found = _LIST.fullmatch(text.strip().removesuffix(_END).strip())
    if found is None:
        return text, []
    try:
        tree = ast.parse(found[1], mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return "", [BadToolCall(found[1], f"not a list of calls: {error}")]
    nodes = tree.elts if isinstance(tree, ast.List) else [tree]
    return "", [_call(node) for node in nodes]


def _call(node: ast.expr) -> ToolCall | BadToolCall:
    text = ast.unparse(node)
    if not isinstance(node, ast.Call) or node.args or any(given.arg is None for given in node.keywords):
        return BadToolCall(text, "not a call with keyword arguments")
    try:
        arguments = {str(given.arg): ast.literal_eval(given.value) for given in node.keywords}
    except (ValueError, TypeError, RecursionError) as error:
        return BadToolCall(text, f"its arguments are not plain values: {error}")
    return ToolCall(ast.unparse(node.func), arguments)
