"""Conversations with tools: which tokens are kept, which are trained on, and what tools and templates may do."""

from __future__ import annotations

import json

import pytest

from miles_api.errors import ConfigError, DataError, HookResultError
from miles_api.sample import Status
from miles_rollout.generate.chat import ChatTemplate
from miles_rollout.generate.derive import derived, idle, problems
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall, parse_tool_calls
from miles_rollout.generate.tool_parsers import named_parser
from miles_rollout.service import RolloutWorker
from miles_rollout.tokenizers import load_tokenizer

TOOLS = """
import asyncio
SPECS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
NOT_SPECS = [{"name": "add"}]
calls = []
meeting = asyncio.Barrier(2)
async def run(name, params):
    calls.append((name, params))
    return str(params["a"] + params["b"])
async def meet(name, params):
    async with asyncio.timeout(10):
        await meeting.wait()
    await asyncio.sleep(0.02 if params["first"] else 0)
    return f"saw {params['first']}"
async def fail(name, params):
    raise KeyError("no such tool")
async def number(name, params):
    return 5
"""
ASK = [{"role": "user", "content": "1 + 2?"}]


def call(name="add", **arguments):
    return "<tool_call>" + json.dumps({"name": name, "arguments": arguments}) + "</tool_call>"


@pytest.fixture
def tools(write):
    """The options of a run whose generate hook is `multi_turn`."""
    named = write(TOOLS)

    def options(execute="run", specs=None):
        given = {
            "generate_execute_tool_function_path": named(execute), "custom_generate_function_path": "multi_turn",
            "generate_tool_call_parser": "hermes",
        }  # fmt: skip
        return given if specs is None else {**given, "generate_tool_specs_path": named(specs)}

    return options


def test_the_tokens_are_those_of_the_rendered_conversation_and_tool_output_is_not_trained_on(bench, tools):
    first, last = f"adding {call(a=1, b=2)}", "it is 3"
    state = bench([first, last], **tools(specs="SPECS"))
    sample = state.run(ASK, metadata={"source": "test"})
    specs = state.hooks.one("tool_specs").target
    prompt = state.rendered(ASK, tools=specs, add_generation_prompt=True)
    turns = [{"role": "assistant", "content": first}, {"role": "tool", "content": "3"}]
    whole = state.rendered([*ASK, *turns, {"role": "assistant", "content": last}], tools=specs)
    assert state.tokenizer.decode(sample.tokens) == whole.removesuffix("\n")
    assert sample.tokens == state.ids(whole)[:-1]
    generated = len(first) + 1, len(last) + 1
    shown = sample.response_length - sum(generated)
    assert sample.response_length == len(sample.tokens) - len(state.ids(prompt))
    assert sample.loss_mask == [1] * generated[0] + [0] * shown + [1] * generated[1]
    assert sample.rollout_log_probs == [-0.5] * generated[0] + [0.0] * shown + [-0.5] * generated[1]
    assert sample.response == f"{first}\nuser\n<tool_response>\n3\n</tool_response>\nassistant\n{last}"
    counts = {"turns": 2, "tool_calls": 1, "malformed_tool_calls": 0, "tool_timeouts": 0, "turn_timeouts": 0}
    assert sample.metadata == {"source": "test", **counts, "observation_tokens": shown}
    assert sample.status is Status.COMPLETED
    # The engine continued exactly what is recorded.
    assert state.requests[1][1]["input_ids"] == sample.tokens[: -generated[1]]
    assert state.hooks.one("tool_specs").stats.calls == 1


def test_generated_ids_are_kept_where_the_tokenizer_would_write_the_text_otherwise(bench, tools, kit):
    def spelled(text, state):
        before, after = text.split("42")
        return {"ids": [*state.ids(before), kit.tokens.index("42"), *state.ids(after)]}

    state = bench(**tools())
    state.script = [spelled(call(a=42, b=0), state), spelled("so 42.", state)]
    sample = state.run(ASK)
    assert sample.tokens.count(kit.tokens.index("42")) == 2
    assert "so 42." in sample.response
    assert state.requests[1][1]["input_ids"].count(kit.tokens.index("42")) == 1


def test_an_answer_that_was_ended_by_a_stop_string_gets_the_end_of_turn_that_it_lacks(bench, tools):
    state = bench([{"text": call(a=1, b=2), "cut": True}, "3"], **tools())
    sample = state.run(ASK)
    text = state.tokenizer.decode(sample.tokens)
    assert f"{call(a=1, b=2)}<|im_end|>\n<|im_start|>user\n<tool_response>" in text
    assert sample.loss_mask.count(1) == len(call(a=1, b=2)) + len("3") + 1


def test_the_calls_of_one_answer_run_at_once_and_are_shown_in_order(bench, tools):
    state = bench([call(first=True) + call(first=False), "done"], **tools("meet"))
    sample = state.run(ASK)
    shown = "<tool_response>\nsaw True\n</tool_response>\n<tool_response>\nsaw False\n</tool_response>"
    assert shown in sample.response
    assert sample.metadata["tool_calls"] == 2
    assert sample.non_generation_time >= 0.02


def test_each_turn_draws_from_a_seed_of_its_own_and_the_same_again(bench, tools):
    seeds = []
    for _ in range(2):
        state = bench([call(a=1, b=2), "3"], **tools())
        state.run(ASK)
        seeds.append([payload["sampling_params"]["sampling_seed"] for _, payload in state.requests])
    assert seeds[0] == seeds[1]
    assert len(set(seeds[0])) == 2


def test_the_model_is_told_of_a_malformed_call_and_it_is_counted(bench, tools):
    state = bench(["<tool_call>{add 1 2}</tool_call>", call(a=1, b=2), "3"], **tools())
    sample = state.run(ASK)
    assert "error: this tool call was not understood" in sample.response
    assert [sample.metadata[key] for key in ("turns", "tool_calls", "malformed_tool_calls")] == [3, 2, 1]
    assert state.hooks.one("execute_tool").stats.calls == 1


def test_what_a_tool_raises_comes_through_and_names_hook_sample_and_call(bench, tools):
    state = bench([call(a=1, b=2)], **tools("fail"))
    with pytest.raises(KeyError, match="no such tool") as caught:
        state.run(ASK, index=7)
    notes = "\n".join(caught.value.__notes__)
    assert "raised by the execute_tool hook" in notes
    assert "on sample 7, turn 0: tool call add({'a': 1, 'b': 2})" in notes
    assert state.hooks.one("execute_tool").stats.errors == 1


def test_a_tool_that_returns_no_text_is_an_error_that_names_it(bench, tools):
    with pytest.raises(HookResultError, match=r"execute_tool hook .*:number returned int for add"):
        bench([call(a=1, b=2)], **tools("number")).run(ASK)


def test_a_conversation_that_still_calls_tools_at_the_last_turn_is_truncated_without_running_them(bench, tools):
    state = bench([call(a=1, b=2)] * 2, generate_max_turns=2, **tools())
    sample = state.run(ASK)
    assert (sample.status, sample.metadata["turns"]) == (Status.TRUNCATED, 2)
    assert state.hooks.one("execute_tool").stats.calls == 1
    assert sample.loss_mask[-1] == 1


def test_tool_output_that_leaves_no_room_for_an_answer_is_not_shown(bench, tools):
    said = call(a=1, b=2)
    shown = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    probe = bench(**tools())
    exact = len(said) + 1 + len(probe.ids(shown))
    sample = bench([said], **tools()).run(ASK, limit=exact)
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, len(said) + 1)
    state = bench([said, "33"], **tools())
    sample = state.run(ASK, limit=exact + 1)
    assert state.requests[1][1]["sampling_params"]["max_new_tokens"] == 1
    assert (sample.status, sample.response_length) == (Status.TRUNCATED, exact + 1)


def test_the_context_limit_counts_tool_output(bench, tools):
    said = call(a=1, b=2)
    state = bench([said, "3"], rollout_max_context_len=200, **tools())
    sample = state.run(ASK)
    assert state.requests[1][1]["sampling_params"]["max_new_tokens"] == 200 - (len(sample.tokens) - 2)


def test_an_aborted_rollout_asks_for_no_further_answer(bench, tools):
    state = bench(**tools())
    state.aborted = True
    sample = state.run(ASK)
    assert (sample.status, state.requests, sample.loss_mask, sample.rollout_log_probs) == (Status.ABORTED, [], [], [])


@pytest.mark.parametrize("start", ["{{ messages | length }}", "{% if messages[-1].role == 'tool' %}tools{% endif %}"])
def test_a_template_that_rewrites_what_came_before_is_refused(bench, tools, kit, tmp_path, start):
    folder = kit.save_tokenizer(tmp_path, start + kit.template)
    state = bench([call(a=1, b=2)], **{**tools(), "hf_checkpoint": folder})
    with pytest.raises(DataError, match="the chat template has no prefix property"):
        state.run(ASK)


def test_a_template_that_treats_the_last_answer_differently_can_be_continued(bench, kit, tmp_path):
    # As Qwen3's, which puts an empty thought into the last answer only.
    thoughtful = kit.template.replace(
        "{{ m.content }}{%", "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}{%"
    )
    assert thoughtful != kit.template
    state = bench(hf_checkpoint=kit.save_tokenizer(tmp_path, thoughtful))
    template = ChatTemplate(state.tokenizer, {})
    found = template.continuation(ASK, [{"role": "tool", "content": "3"}])
    assert state.tokenizer.decode(found.turn_end) == "<|im_end|>\n"
    assert state.tokenizer.decode(found.opening).startswith("<|im_start|>user\n<tool_response>")


def test_a_template_that_cannot_render_the_messages_says_which(bench, kit, tmp_path):
    folder = kit.save_tokenizer(tmp_path, "{{ raise_exception('no tools here') }}")
    template = ChatTemplate(bench(hf_checkpoint=folder).tokenizer, {})
    with pytest.raises(DataError, match="cannot render messages of user: no tools here"):
        template.prompt(ASK)


def test_a_text_prompt_stands_for_itself_and_takes_no_tool_specifications(bench, tools):
    state = bench([call(a=1, b=2), "3"], **tools())
    sample = state.run("Q: 1+2", as_text=True)
    assert state.requests[0][1]["input_ids"] == state.ids("Q: 1+2")
    assert sample.response.endswith("<tool_response>\n3\n</tool_response>\nassistant\n3")
    state = bench(**tools(specs="SPECS"))
    with pytest.raises(DataError, match=r"sample 3: --generate-tool-specs-path .* the prompt is text"):
        state.run("Q: 1+2", as_text=True, index=3)


def test_a_single_turn_renders_chat_messages(bench):
    state = bench(["hello"])
    sample = state.run(ASK)
    assert state.requests[0][1]["input_ids"] == state.ids("<|im_start|>user\n1 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert sample.loss_mask == [1] * 6


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("just text", "just text", []),
        ('a <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> b', "a", [ToolCall("f", {"x": 1})]),
        ('<tool_call>{"name": "f"}</tool_call>', "", [ToolCall("f", {})]),
        ('<tool_call>{"name": "f", "arguments": {}}', "", [ToolCall("f", {})]),
        ("<think><tool_call>{}</tool_call></think>no", "<think><tool_call>{}</tool_call></think>no", []),
    ],
)
def test_calls_are_read_from_the_text(text, content, calls):
    assert parse_tool_calls(text, named_parser("hermes")) == (content, calls)


@pytest.mark.parametrize(
    "inside", ["{", '{"arguments": {}}', '{"name": "f", "arguments": "x"}', "[]", '{"name": 1}', "", "\ud800"]
)
def test_what_only_looks_like_a_call_is_a_bad_one(inside):
    _, (bad,) = parse_tool_calls(f"<tool_call>{inside}</tool_call>", named_parser("hermes"))
    assert isinstance(bad, BadToolCall)


def test_a_tool_or_an_agent_hook_decides_which_generation_runs(configure, tools, write, chat_dir):
    options = tools()
    del options["custom_generate_function_path"]
    agent = {"custom_agent_function_path": write("async def agent(u, p, r, m, **k): ...")("agent")}
    assert derived(configure(**options)) == {"custom_generate_function_path": "multi_turn"}
    assert derived(configure(**agent)) == {"custom_generate_function_path": "agentic"}
    assert derived(configure()) == {}
    assert derived(configure(**options, custom_generate_function_path="mine")) == {}
    for elsewhere in ({"loss_type": "sft_loss"}, {"rollout_function_path": "m.f"}, {"load_debug_rollout_data": "d"}):
        assert derived(configure(**options, **elsewhere)) == {}
    assert derived(configure(**options, rollout_function_path="inference"))
    assert set(idle(configure(**options))) == {"agent", "agent_abort"}
    assert set(idle(configure(**agent))) == {"execute_tool", "tool_specs"}
    assert not list(problems(configure(**options, hf_checkpoint=chat_dir)))
    assert "drop one" in next(problems(configure(**options, **agent, hf_checkpoint=chat_dir)))


def test_a_conversation_without_a_chat_template_is_refused_before_anything_starts(configure, tools, write, chat_dir):
    agent = {"custom_agent_function_path": write("async def agent(u, p, r, m, **k): ...")("agent")}
    for options in ({**agent, "custom_generate_function_path": "agentic"}, tools()):
        (problem,) = problems(configure(**options))
        assert "has no chat template: give one with --apply-chat-template-kwargs" in problem
        assert not list(problems(configure(**options, hf_checkpoint=chat_dir)))
        own = {"chat_template": "{{ messages }}"}
        assert not list(problems(configure(**options, apply_chat_template_kwargs=own)))


def test_what_a_generation_lacks_is_named_before_anything_starts(configure, tools, chat_dir):
    def first(**options):
        return next(problems(configure(hf_checkpoint=chat_dir, **options)), "nothing")

    for generate, flag in (("multi_turn", "--generate-execute-tool"), ("agentic", "--custom-agent")):
        assert f"pass {flag}-function-path" in first(custom_generate_function_path=generate)
    assert "not an OpenAI tool specification" in first(**tools(specs="NOT_SPECS"))
    assert "is a function, not a list" in first(**tools(specs="run"))
    assert "leave it out" in first(**tools(specs="SPECS"), apply_chat_template=True)
    assert first(**tools(specs="SPECS")) == "nothing"


def test_malformed_specifications_are_an_error_when_they_are_read(bench, tools):
    with pytest.raises(ConfigError, match=r"NOT_SPECS\[0\] is not an OpenAI tool specification"):
        bench(**tools(specs="NOT_SPECS")).run(ASK)


def test_a_rollout_runs_tools_and_masks_their_output_in_the_columns(
    configure, fake_engine, chat_dir, tools, chat_source
):
    tokenizer = load_tokenizer(chat_dir)

    def answer(payload):
        second = "<tool_response>" in tokenizer.decode(payload["input_ids"])
        ids = [*tokenizer.encode("3" if second else call(a=1, b=2), add_special_tokens=False), tokenizer.eos_token_id]
        meta = {
            "finish_reason": {"type": "stop"}, "weight_version": "1", "cached_tokens": 2,
            "output_token_logprobs": [[-0.5, i, None] for i in ids],
        }  # fmt: skip
        return 200, {"text": tokenizer.decode(ids, skip_special_tokens=True), "output_ids": ids, "meta_info": meta}

    config = configure(hf_checkpoint=chat_dir, data_source_path=chat_source, **tools(specs="SPECS"))
    worker = RolloutWorker(config)
    try:
        worker.start(fake_engine(answer).url)
        result = worker.generate(0, "1")
        rows = {row["hook"]: row for row in worker.report()}
    finally:
        worker.stop()
    masks = result["batch"]["loss_masks"]
    assert len(masks) == 6
    assert {sum(mask) for mask in masks} == {len(call(a=1, b=2)) + 1 + 2}
    assert all(0 in mask for mask in masks)
    assert (rows["execute_tool"]["calls"], rows["tool_specs"]["calls"]) == (6, 1)
