"""Tool calls as families of models write them: each is rendered by a template of the family's form, and read back."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import jinja2
import pytest

from miles_api.errors import ConfigError
from miles_rollout.generate.derive import problems
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall, parse_tool_calls
from miles_rollout.generate.tool_parsers import named_parser, parser_for
from miles_rollout.generate.tool_parsers.formats import ALIASES, FORMATS
from miles_rollout.generate.tool_parsers.sglang import sglang_parser

TOOL = {
    "name": "search",
    "parameters": {
        "type": "object",
        "properties": {
            "query": {"type": "string"}, "top": {"type": "integer"}, "exact": {"type": "boolean"},
            "tags": {"type": "array"}, "where": {"type": "object"},
        },
    },
}  # fmt: skip
SPECS = [{"type": "function", "function": TOOL}, {"type": "function", "function": {"name": "now", "parameters": {}}}]
SEARCH = ToolCall("search", {"query": '7 "a"\n<b> [c]', "top": 3, "exact": True, "tags": ["x", "y"], "where": {"k": 1}})
NOW = ToolCall("now", {})

_KV = "{{ v if v is string else v | tojson }}"
# What the chat templates of these families write for `message.tool_calls`, and nothing else of them.
TEMPLATES = {
    "hermes": """{% for c in calls %}
<tool_call>
{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }}}
</tool_call>{% endfor %}""",
    "qwen3_coder": """{% for c in calls %}
<tool_call>
<function={{ c.name }}>
{% for k, v in c.arguments.items() %}<parameter={{ k }}>
KV
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}""".replace("KV", _KV),
    "glm45": """{% for c in calls %}
<tool_call>{{ c.name }}
{% for k, v in c.arguments.items() %}<arg_key>{{ k }}</arg_key>
<arg_value>KV</arg_value>
{% endfor %}</tool_call>{% endfor %}""".replace("KV", _KV),
    "llama3": """{"name": "{{ calls[0].name }}", "parameters": {{ calls[0].arguments | tojson }}}<|eot_id|>""",
    "mistral": """[TOOL_CALLS] [{% for c in calls %}{"name": "{{ c.name }}", "arguments": {{ c.arguments | tojson }},
 "id": "abcdefghi"}{% if not loop.last %}, {% endif %}{% endfor %}]""",
    "deepseekv3": """<｜tool▁calls▁begin｜>{% for c in calls %}<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ c.name }}
```json
{{ c.arguments | tojson }}
```<｜tool▁call▁end｜>
{% endfor %}<｜tool▁calls▁end｜>""",
    "deepseekv31": """<｜tool▁calls▁begin｜>{% for c in calls %}<｜tool▁call▁begin｜>{{ c.name }}<｜tool▁sep｜>
{{- c.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>""",
    "kimi_k2": """<|tool_calls_section_begin|>{% for c in calls %}<|tool_call_begin|>functions.{{ c.name }}:
{{- loop.index0 }}<|tool_call_argument_begin|>{{ c.arguments | tojson }}<|tool_call_end|>{% endfor -%}
<|tool_calls_section_end|>""",
    "pythonic": """[{% for c in calls %}{{ c.name }}({% for k, v in c.arguments.items() %}{{ k }}={{ v | py }}
{%- if not loop.last %}, {% endif %}{% endfor %}){% if not loop.last %}, {% endif %}{% endfor %}]""",
}
NAMED_MISTRAL = """{% for c in calls %}[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments | tojson }}{% endfor %}"""
OPENINGS = {"hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]now[ARGS]"}
ALONE = {"llama3"}
"""Families whose template writes one call at most."""


def written(template, *calls):
    world = jinja2.Environment()
    world.filters |= {"tojson": lambda value: json.dumps(value, ensure_ascii=False), "py": repr}
    return world.from_string(template).render(calls=[{"name": c.name, "arguments": c.arguments} for c in calls])


def parse(name, text):
    return parse_tool_calls(text, named_parser(name), SPECS)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_a_familys_template_writes_is_read_back(name):
    calls = [SEARCH] if name in ALONE else [SEARCH, NOW, SEARCH]
    assert parse(name, written(TEMPLATES[name], *calls)) == ("", calls)
    assert parse(name, written(TEMPLATES[name], NOW)) == ("", [NOW])


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - ALONE - {"pythonic"}))
def test_text_and_a_thought_before_the_calls_are_kept_and_a_call_in_a_thought_is_none(name):
    call = written(TEMPLATES[name], NOW)
    thought = f"<think>{written(TEMPLATES[name], SEARCH)}</think>\n"
    assert parse(name, f"{thought}Let me look. {call}") == (f"{thought}Let me look.", [NOW])
    assert parse(name, f"{thought}No tool.") == (f"{thought}No tool.", [])


def test_every_format_is_tested_and_every_other_name_means_one():
    assert set(TEMPLATES) == {*FORMATS, "pythonic"}
    assert all(named_parser(other) is named_parser(other) for other in ALIASES)
    assert set(ALIASES.values()) <= set(FORMATS)


def test_both_forms_of_mistral_are_read():
    assert parse("mistral", written(NAMED_MISTRAL, SEARCH, NOW)) == ("", [SEARCH, NOW])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", '<tool_call>\n{"name": "now", "arguments": {}}'),
        ("deepseekv3", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```"),
        ("deepseekv31", "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>now<｜tool▁sep｜>{}"),
        ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}"),
        ("llama3", '<|python_tag|>{"name": "now", "parameters": {}}'),
    ],
)
def test_a_call_whose_closing_special_tokens_are_cut_off_counts(name, text):
    assert parse(name, text)[1] == [NOW]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hermes", "<tool_call>{now}</tool_call>"),
        ("hermes", '<tool_call>{"name": "now", "arguments": "x"}</tool_call>'),
        ("llama3", '{"name": "now", "parameters": {'),
        ("llama3", "<|python_tag|>brave.call(query='x')"),
        ("mistral", "[TOOL_CALLS] [{now}]"),
        ("mistral", '[TOOL_CALLS][{"name": "now", "arguments": 3}]'),
        ("mistral", "[TOOL_CALLS]now[ARGS]{"),
        ("deepseekv3", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{\n```<｜tool▁call▁end｜>"),
        ("deepseekv31", "<｜tool▁call▁begin｜>now<｜tool▁sep｜>{<｜tool▁call▁end｜>"),
        ("kimi_k2", "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{<|tool_call_end|>"),
        *((name, opening + '{"name": "now", "arguments": ' + "[" * 100_000) for name, opening in OPENINGS.items()),
        ("hermes", '<tool_call>{"name": "now", "arguments": {"a": "\\ud83d"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "\\ud83d", "arguments": {}}</tool_call>'),
        ("pythonic", "[now(a='\\ud83d')]"),
        ("pythonic", "[now(a=1j)]"),
        ("pythonic", "[now(]"),
        ("pythonic", "[now(3)]"),
        ("pythonic", "[now(a=b)]"),
        ("pythonic", "[now(a=" + "(" * 2000 + ")]"),
    ],
)
def test_what_begins_like_a_call_and_is_none_is_a_bad_one_that_says_why(name, text):
    _, (bad,) = parse(name, text)
    assert isinstance(bad, BadToolCall)
    assert bad.problem


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("llama3", '{"answer": 3}'),
        ("llama3", 'It is {"name": "x"}.'),
        ("pythonic", "[1, 2, 3]"),
        ("pythonic", "a list: [f(a=1)]"),
        *((name, "Just text, with < and [ and {.") for name in TEMPLATES),
    ],
)
def test_text_that_is_no_call_is_an_answer(name, text):
    assert parse(name, text) == (text, [])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("qwen3_coder", "<function=search><parameter=query>\n1\n<parameter=query>\n2\n</function>"),
        ("glm45", "<tool_call>search\n<arg_key>query</arg_key><arg_value>1\n<parameter=query>\n2</tool_call>"),
    ],
)
def test_a_value_that_is_not_closed_ends_with_its_call(name, text):
    _, (call,) = parse(name, text)
    assert call.arguments["query"].split() == ["1", "<parameter=query>", "2"]


def test_one_bad_call_leaves_the_others():
    text = "<tool_call>{</tool_call>" + written(TEMPLATES["hermes"], NOW)
    _, (bad, good) = parse("hermes", text)
    assert (type(bad), good) == (BadToolCall, NOW)


def tokenizer(template, **values):
    return SimpleNamespace(chat_template=template, **values)


@pytest.mark.parametrize("name", sorted(set(TEMPLATES) - {"pythonic", "llama3"}))
def test_auto_tells_the_family_by_its_chat_template(args_of, name):
    assert parser_for(args_of(), tokenizer(TEMPLATES[name])) is named_parser(name)


def test_auto_tells_llama_and_deepseek_by_what_their_templates_say(args_of):
    llama = '{{- \'Respond in the format {"name": function name, "parameters": dictionary of argument name and its\' }}'
    deepseek = "{{'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name']}}"
    assert parser_for(args_of(), tokenizer(llama)) is named_parser("llama3")
    assert parser_for(args_of(), tokenizer(deepseek)) is named_parser("deepseekv3")
    assert parser_for(args_of(), tokenizer({"default": "", "tool_use": TEMPLATES["glm45"]})) is named_parser("glm")


def test_auto_tells_the_family_by_the_runs_own_chat_template_where_it_has_one(args_of, configure, write):
    own = {"chat_template": TEMPLATES["glm45"]}
    args = args_of(apply_chat_template_kwargs=own)
    assert parser_for(args, tokenizer(TEMPLATES["hermes"])) is named_parser("glm45")
    options = {"generate_execute_tool_function_path": write("async def run(n, p): ...")("run")}
    options["custom_generate_function_path"] = "multi_turn"
    assert not list(problems(configure(**options, apply_chat_template_kwargs=own)))


def test_auto_prefers_the_response_template_that_a_tokenizer_brings(args_of):
    calls = {"open": "<<", "close": ">>", "repeats": True, "content": "json", "transform": {"function": "{content}"}}
    own = {"start_anchor": "A:", "fields": {"tool_calls": calls, "content": {"content": "text"}}}
    parser = parser_for(args_of(), tokenizer(TEMPLATES["hermes"], response_template=own))
    assert parse_tool_calls('so <<{"name": "now"}>>', parser) == ("so", [NOW])
    _, (bad,) = parse_tool_calls("so <<{>>", parser)
    assert isinstance(bad, BadToolCall)
    with pytest.raises(ConfigError, match=r"response_template is not one.*name a --generate-tool-call-parser"):
        parser_for(args_of(), tokenizer("", response_template={"fields": {}}))


def test_a_name_counts_more_than_what_the_tokenizer_says(args_of):
    args = args_of(generate_tool_call_parser="qwen25")
    assert parser_for(args, tokenizer(TEMPLATES["glm45"])) is named_parser("hermes")


def test_a_parser_that_is_unknown_or_cannot_be_told_is_refused_before_anything_starts(configure, write, kit, tmp_path):
    options = {
        "generate_execute_tool_function_path": write("async def run(n, p): ...")("run"),
        "custom_generate_function_path": "multi_turn",
    }
    silent = kit.save_tokenizer(tmp_path / "silent", "{{ messages }}")
    (problem,) = problems(configure(**options, hf_checkpoint=silent))
    assert "does not show how its model writes a tool call. Name one of deepseekv3, " in problem
    assert not list(problems(configure(**options, hf_checkpoint=silent, generate_tool_call_parser="hermes")))
    telling = kit.save_tokenizer(tmp_path / "telling", kit.template)
    assert not list(problems(configure(**options, hf_checkpoint=telling)))
    (problem,) = problems(configure(**options, hf_checkpoint=telling, generate_tool_call_parser="herpes"))
    assert "herpes is not among deepseekv3" in problem
    assert "SGLang's, which is not installed" in problem


def test_sglangs_parsers_are_used_under_their_names_where_it_is_installed(monkeypatch):
    """Against a stand-in of SGLang's `FunctionCallParser`, with its names and its way to answer."""
    library = ModuleType("sglang.srt.function_call.function_call_parser")

    class Item(SimpleNamespace):
        @classmethod
        def model_validate(cls, spec):
            return cls(**spec)

    class FunctionCallParser:
        ToolCallParserEnum = {"gpt-oss": object}

        def __init__(self, tools, name):
            assert (name, [tool.function["name"] for tool in tools]) == ("gpt-oss", ["search", "now"])

        def has_tool_call(self, text):
            return "CALL" in text

        def parse_non_stream(self, text):
            before, mark, arguments = text.partition("CALL")
            good = mark and arguments.startswith("{")
            return before, [SimpleNamespace(name="now", parameters=arguments)] if good else []

    library.FunctionCallParser, library.Tool = FunctionCallParser, Item
    monkeypatch.setitem(sys.modules, library.__name__, library)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    parser = sglang_parser("gpt-oss")
    assert parse_tool_calls('so CALL{"a": 1}', parser, SPECS) == ("so", [ToolCall("now", {"a": 1})])
    for text in ("CALL{a", "CALL x"):
        _, (bad,) = parse_tool_calls(text, parser, SPECS)
        assert isinstance(bad, BadToolCall)
    assert parse_tool_calls("text", parser, SPECS) == ("text", [])
    with pytest.raises(ConfigError, match="--generate-tool-call-parser gptoss: SGLang has gpt-oss"):
        named_parser("gptoss")
