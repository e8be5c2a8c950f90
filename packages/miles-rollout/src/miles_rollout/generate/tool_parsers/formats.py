"""How families of models write a tool call, as response templates: transformers reads them.

Each is what the family's own chat template writes for `tool_calls`. What ends an answer may be missing, since tokens
that end it are cut off; a call whose JSON is not whole is kept as text, so that the model can be told.
"""

from __future__ import annotations

from typing import Any

__all__ = ["ALIASES", "FORMATS", "MARKS"]

_JSON = {"content": "json", "content_args": {"allow_non_json": True}}
_WHOLE = {"function": "{content}"}
_NAMED = {"function": {"name": "{name}", "arguments": "{content}"}}


def _template(*ways: dict[str, Any]) -> dict[str, Any]:
    """Return a response template that knows calls, written in one of several ways, and text."""
    fields = {f"tool_calls_{number}": {"repeats": True, **way} for number, way in enumerate(ways)}
    # The anchor is for prompts, and no prompt is parsed.
    return {"start_anchor": "\ue000", "fields": {**fields, "content": {"content": "text"}}}


FORMATS: dict[str, dict[str, Any]] = {
    # Qwen 2.5 and 3, Hermes: <tool_call>{"name": …, "arguments": {…}}</tool_call>
    "hermes": _template(
        {"open": "<tool_call>", "close": "</tool_call>", **_JSON, "transform": {"function": "{content}"}}
    ),
    # Qwen3-Coder, Qwen 3.5: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function></tool_call>
    "qwen3_coder": _template(
        {
            "open_pattern": r"(?:<tool_call>\s*)?<function=(?P<name>[^>\n]*)>",
            "close_pattern": r"</function>(?:\s*</tool_call>)?",
            "content": "xml-inline",
            # A value that is not closed ends with the call: to look for its end anew after each of many takes seconds.
            "content_args": {"tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\n?(?P<value>.*?)(?:\n?</parameter>|\Z)"},
            "transform": _NAMED,
        }
    ),
    # GLM 4.5 to 4.7: <tool_call>NAME<arg_key>KEY</arg_key><arg_value>VALUE</arg_value></tool_call>
    "glm45": _template(
        {
            "open_pattern": r"<tool_call>\s*(?P<name>[^<\s]*)",
            "close": "</tool_call>",
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<arg_key>(?P<key>[^<]*)</arg_key>\s*<arg_value>(?P<value>.*?)(?:</arg_value>|\Z)"
            },
            "transform": _NAMED,
        }
    ),
    # Llama 3.1 to 4: the whole answer is {"name": …, "parameters": {…}}, or what follows a tag is.
    "llama3": _template(
        {
            "open_pattern": r"<\|python_(?:tag|start)\|>\s*|^\s*(?=\{\s*\"(?:name|type)\")",
            "close_pattern": r"<\|(?:eom_id|eot_id|eot|python_end)\|>",
            **_JSON,
            "transform": _WHOLE,
        }
    ),
    # Mistral: [TOOL_CALLS][{"name": …, "arguments": {…}}, …], or since Magistral [TOOL_CALLS]NAME[ARGS]{…} for each.
    "mistral": _template(
        {"open_pattern": r"\[TOOL_CALLS\]\s*(?=[\[{])", **_JSON},
        {
            "open_pattern": r"\[TOOL_CALLS\]\s*(?P<name>[^\[{\s]+)(?:\[CALL_ID\][^\[]*)?(?:\[ARGS\])?\s*",
            "close_pattern": r"(?=\[TOOL_CALLS\])",
            **_JSON,
            "transform": _NAMED,
        },
    ),
    # DeepSeek V3 and R1: …function<｜tool▁sep｜>NAME, and the arguments in a fence.
    "deepseekv3": _template(
        {
            "open_pattern": r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>function<｜tool▁sep｜>"
            r"(?P<name>[^\n<`]*)\n*(?:```json\n)?",
            "close_pattern": r"\s*```(?:<｜tool▁call▁end｜>)?(?:\s*<｜tool▁calls▁end｜>)?|<｜tool▁call▁end｜>",
            **_JSON,
            "transform": _NAMED,
        }
    ),
    # DeepSeek V3.1: …NAME<｜tool▁sep｜>{…}
    "deepseekv31": _template(
        {
            "open_pattern": r"(?:<｜tool▁calls▁begin｜>\s*)?<｜tool▁call▁begin｜>(?P<name>[^<]*)<｜tool▁sep｜>",
            "close_pattern": r"<｜tool▁call▁end｜>(?:\s*<｜tool▁calls▁end｜>)?",
            **_JSON,
            "transform": _NAMED,
        }
    ),
    # Kimi K2: <|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{…}<|tool_call_end|>
    "kimi_k2": _template(
        {
            "open_pattern": r"(?:<\|tool_calls_section_begin\|>\s*)?<\|tool_call_begin\|>\s*(?:functions\.)?"
            r"(?P<name>[^:<]*?)(?::\d+)?\s*<\|tool_call_argument_begin\|>",
            "close_pattern": r"<\|tool_call_end\|>(?:\s*<\|tool_calls_section_end\|>)?",
            **_JSON,
            "transform": _NAMED,
        }
    ),
}

ALIASES = {"glm": "glm45", "glm47": "glm45", "qwen": "hermes", "qwen25": "hermes", "step3p5": "qwen3_coder"}
"""Other names that SGLang has for these."""

MARKS = {
    "<function=": "qwen3_coder",
    "<arg_key>": "glm45",
    "<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>": "deepseekv3",
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>": "deepseekv3",
    "<｜tool▁call▁begin｜>": "deepseekv31",
    "<|tool_call_begin|>": "kimi_k2",
    "[TOOL_CALLS]": "mistral",
    "<tool_call>": "hermes",
    '"parameters": dictionary of argument name': "llama3",
    "<|python_tag|>": "llama3",
}
"""What a chat template holds, and what its model therefore writes; the first that is found counts."""
