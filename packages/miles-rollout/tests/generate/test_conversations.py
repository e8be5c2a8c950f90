"""Conversations with tools: deadlines, bounds, one sample an answer, and ids that a real engine continues."""

from __future__ import annotations

import asyncio
import itertools
import json

import httpx
import pytest

from miles_api.errors import DataError, ServiceError
from miles_api.sample import Sample, Status
from miles_rollout.generate.turn import TAKES_LAST_REWARD
from miles_rollout.service import RolloutWorker
from miles_rollout.tokenizers import load_tokenizer

TOOLS = """
import asyncio
parameters = {"type": "object", "required": ["a"]}
SPECS = [{"type": "function", "function": {"name": "wait", "parameters": parameters}}]
done = []
release = []
async def wait(name, params):
    if params["a"] == "for ever":
        try:
            await asyncio.Event().wait()
        finally:
            done.append("cleaned up")
    return params["a"]
async def name_of_a_file(name, params):
    return b"\\xff.txt".decode(errors="surrogateescape")
async def stubborn(name, params):
    while not release:
        try:
            await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            pass
    return "late"
"""
ASK = [{"role": "user", "content": "go"}]
FORGETFUL = "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}{% else %}"


def call(value="x", name="wait"):
    return "<tool_call>" + json.dumps({"name": name, "arguments": {"a": value}}) + "</tool_call>"


@pytest.fixture
def hooks(write):
    return write(TOOLS)


@pytest.fixture
def tools(hooks):
    """The options of a run of `multi_turn`."""

    def options(execute="wait", **values):
        return {
            "generate_execute_tool_function_path": hooks(execute), "generate_tool_specs_path": hooks("SPECS"),
            "custom_generate_function_path": "multi_turn", **values,
        }  # fmt: skip

    return options


@pytest.fixture
def forgetful(kit, tmp_path):
    """A tokenizer whose template leaves thoughts out of earlier answers."""
    template = kit.template.replace("{{ m.content }}", FORGETFUL + "{{ m.content }}{% endif %}")
    assert template != kit.template
    return kit.save_tokenizer(tmp_path / "forgetful", template)


def module_of(state):
    return state.hooks.need("execute_tool").target.__globals__


def test_a_tool_that_runs_past_its_deadline_is_told_to_the_model_and_the_conversation_goes_on(bench, tools):
    state = bench([call("for ever") + call("quick"), "done"], **tools(generate_tool_timeout=0.1))
    sample = state.run(ASK)
    shown = "<tool_response>\nerror: wait timed out after 0.1 s\n</tool_response>\n<tool_response>\nquick\n"
    assert shown in sample.response
    assert (sample.status, sample.metadata["tool_timeouts"], sample.metadata["tool_calls"]) == (Status.COMPLETED, 1, 2)
    stats = state.hooks.one("execute_tool").stats
    assert (stats.timeouts, stats.errors) == (1, 0)
    assert sample.non_generation_time >= 0.1
    assert module_of(state)["done"] == ["cleaned up"]


def test_a_tool_that_swallows_its_cancellation_is_left_behind(bench, tools, monkeypatch):
    monkeypatch.setattr("miles_rollout.generate.tools._GRACE", 0.05)
    state = bench([call(), "done"], **tools("stubborn", generate_tool_timeout=0.05))

    async def main():
        sample = await state.generate(ASK)
        module_of(state)["release"].append(True)
        await state.hooks.aclose()
        return sample

    assert asyncio.run(main()).metadata["tool_timeouts"] == 1


def stall_after_one_answer(state):
    answer = state.post

    async def post(path, payload):
        if state.requests:
            await asyncio.Event().wait()
        return await answer(path, payload)

    state.post = post


def test_an_answer_that_runs_past_its_deadline_truncates_the_conversation_before_it(bench, tools):
    state = bench([call()], **tools(generate_turn_timeout=0.1))
    stall_after_one_answer(state)
    sample = state.run(ASK)
    assert (sample.status, sample.metadata["turns"], sample.metadata["turn_timeouts"]) == (Status.TRUNCATED, 1, 1)
    assert sample.response.endswith("<tool_response>\nx\n</tool_response>\nassistant\n")
    assert sum(sample.loss_mask) == len(call()) + 1


def test_a_conversation_that_was_begun_starts_anew(bench, tools):
    whole = bench([call("1"), "done"], **tools()).run(ASK)
    half = bench([{"text": call("1")[:7], "finish": "abort"}], **tools()).run(ASK)
    assert (half.response, half.status) == ("<tool_c", Status.ABORTED)
    made = bench([call("1"), "done"], **tools()).run(begun=half)
    assert (made.tokens, made.loss_mask, made.response) == (whole.tokens, whole.loss_mask, whole.response)


def test_a_time_out_of_somebody_else_is_no_deadline_of_ours(bench, tools):
    with pytest.raises(TimeoutError, match="theirs"):
        bench([TimeoutError("theirs")], **tools()).run(ASK)


def test_a_call_of_no_tool_and_one_without_what_it_needs_are_told_to_the_model(bench, tools):
    lacking = '<tool_call>{"name": "wait", "arguments": {}}</tool_call>'
    state = bench([call(name="weight") + lacking, "done"], **tools())
    sample = state.run(ASK)
    assert "there is no tool 'weight', only wait\n" in sample.response
    assert "wait lacks a\n" in sample.response
    assert sample.metadata["malformed_tool_calls"] == 2
    assert state.hooks.one("execute_tool").stats.calls == 0


def test_tool_output_with_half_a_character_is_shown_without_it(bench, tools):
    state = bench([call("x"), "done"], **tools("name_of_a_file"))
    assert "<tool_response>\n?.txt\n" in state.run(ASK).response


def test_long_tool_output_is_shown_by_its_beginning_and_its_end(bench, tools):
    bounded = tools(generate_max_tool_response_len=9)
    sample = bench([call("0123456789" * 3), "done"], **bounded).run(ASK)
    assert "<tool_response>\n01234\n[21 of 30 tokens left out]\n6789\n</tool_response>" in sample.response
    sample = bench([call("012345678"), "done"], **bounded).run(ASK)
    assert "<tool_response>\n012345678\n</tool_response>" in sample.response


def test_an_engine_that_saw_another_prompt_than_was_sent_is_an_error_unless_middleware_said_so(bench, tools):
    state = bench(["one", "two"], **tools())
    answer = state.post

    def seen(**meta):
        async def post(path, payload):
            reply = await answer(path, payload)
            return {**reply, "meta_info": {**reply["meta_info"], **meta}}

        return post

    state.post = seen(prompt_tokens=3)
    with pytest.raises(ServiceError, match=r"sample 4: the engine saw a prompt of 3 tokens, and .* were sent"):
        state.run(ASK, index=4)
    state.post = seen(prompt_tokens=3, changed_tokens_by=["redact"])
    assert state.run(ASK).metadata["changed_tokens_by"] == ["redact"]


def test_with_one_sample_an_answer_each_prompt_is_what_the_engine_was_sent(bench, tools):
    state = bench([call("1"), call("2"), "done"], **tools(generate_multi_samples=True))
    samples = state.run(ASK, metadata={"source": "test"})
    assert [sample.metadata["turn"] for sample in samples] == [0, 1, 2]
    assert [sample.response for sample in samples] == [call("1"), call("2"), "done"]
    for sample, (_, payload) in zip(samples, state.requests, strict=True):
        assert sample.tokens[: -sample.response_length] == payload["input_ids"]
        assert (sample.loss_mask, sample.metadata["turns"]) == ([1] * sample.response_length, 1)
        assert (sample.index, sample.group_index) == (0, 0)
    for before, after in itertools.pairwise(samples):
        assert after.tokens[: len(before.tokens)] == before.tokens
    assert [sample.metadata["tool_calls"] for sample in samples] == [1, 1, 0]
    shown = "\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert [sample.metadata["observation_tokens"] for sample in samples] == [0, *[len(state.ids(shown))] * 2]
    assert [sample.metadata.get(TAKES_LAST_REWARD, False) for sample in samples] == [True, True, False]


def test_one_sample_an_answer_keeps_generated_ids_where_the_template_only_appends(bench, tools, kit):
    state = bench(**tools(generate_multi_samples=True))
    before, after = call("42").split("42")
    odd = {"ids": [*state.ids(before), kit.tokens.index("42"), *state.ids(after)]}
    state.script = [odd, "done"]
    first, second = state.run(ASK)
    assert second.tokens[: len(first.tokens)] == first.tokens


def test_a_template_that_rewrites_history_is_refused_by_a_message_that_names_the_way_out(bench, tools, kit, tmp_path):
    folder = kit.save_tokenizer(tmp_path, "{{ messages | length }}" + kit.template)
    with pytest.raises(DataError, match=r"no prefix property.*--generate-multi-samples"):
        bench([call()], **tools(hf_checkpoint=folder)).run(ASK)
    state = bench([call("1"), "done"], **tools(hf_checkpoint=folder, generate_multi_samples=True))
    first, second = state.run(ASK)
    assert state.tokenizer.decode(first.tokens).startswith("1<|im_start|>")
    assert state.tokenizer.decode(second.tokens).startswith("3<|im_start|>")


def test_one_sample_an_answer_sees_what_the_template_shows_of_earlier_answers(bench, tools, forgetful):
    said = "<think>hm</think>" + call("1")
    state = bench([said, "done"], **tools(hf_checkpoint=forgetful, generate_multi_samples=True))
    first, second = state.run(ASK)
    assert (first.response, second.response) == (said, "done")
    assert "hm" not in state.tokenizer.decode(second.tokens)
    rendered = state.rendered(
        [*ASK, {"role": "assistant", "content": said}, {"role": "tool", "content": "1"}],
        tools=state.hooks.one("tool_specs").target, add_generation_prompt=True,
    )  # fmt: skip
    assert state.requests[1][1]["input_ids"] == state.ids(rendered)


def test_one_sample_an_answer_has_the_room_of_one_conversation(bench, tools):
    script = [call("1"), "done"]
    whole = bench(script, **tools()).run(ASK)
    for limit, responses in ((whole.response_length, 2), (whole.response_length - 5, 1)):
        samples = bench(script, **tools(generate_multi_samples=True)).run(ASK, limit=limit)
        samples = samples if isinstance(samples, list) else [samples]
        assert (len(samples), samples[-1].status is Status.TRUNCATED) == (responses, responses == 1)


def test_an_answer_that_never_came_is_no_sample_of_its_own(bench, tools):
    state = bench([call()], **tools(generate_multi_samples=True, generate_turn_timeout=0.1))
    stall_after_one_answer(state)
    sample = state.run(ASK)
    assert (sample.status, sample.metadata["turn_timeouts"], sample.response) == (Status.TRUNCATED, 1, call())


def test_an_evaluation_counts_each_conversation_once(bench, tools):
    state = bench([call(), "done"], **tools(generate_multi_samples=True))
    sample = state.run(ASK, evaluation=True)
    assert isinstance(sample, Sample)
    assert sample.response == "done"


REWARD = """
async def score(args, sample):
    return float(sample.response == "done")
"""


@pytest.mark.parametrize("fanned", [True, False])
def test_a_rollout_gives_all_answers_the_reward_of_the_last_and_reports_what_tools_did(
    configure, fake_engine, chat_dir, tools, chat_source, write, fanned
):
    tokenizer = load_tokenizer(chat_dir)
    asked = []

    def answer(payload):
        asked.append(payload["input_ids"])
        second = "<tool_response>" in tokenizer.decode(payload["input_ids"])
        ids = [*tokenizer.encode("done" if second else call("3"), add_special_tokens=False), tokenizer.eos_token_id]
        meta = {
            "finish_reason": {"type": "stop"}, "weight_version": "1", "prompt_tokens": len(payload["input_ids"]),
            "output_token_logprobs": [[-0.5, i, None] for i in ids],
        }  # fmt: skip
        return 200, {"text": tokenizer.decode(ids, skip_special_tokens=True), "output_ids": ids, "meta_info": meta}

    values = tools(generate_multi_samples=fanned, custom_rm_path=write(REWARD)("score"))
    config = configure(hf_checkpoint=chat_dir, data_source_path=chat_source, rm_type=None, **values)
    worker = RolloutWorker(config)
    try:
        worker.start(fake_engine(answer).url)
        result = worker.generate(0, "1")
        rows = {row["hook"]: row for row in worker.report()}
    finally:
        worker.stop()
    batch = result["batch"]
    conversations = 6
    size = 2 * conversations if fanned else conversations
    assert (len(batch["tokens"]), len(set(batch["rollout_ids"]))) == (size, conversations)
    assert rows["reward"]["calls"] == conversations
    expected = 1.0 if fanned else 0.0
    assert batch["raw_reward"] == [expected] * size
    metrics = result["metrics"]
    shown = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert metrics["rollout/turns"] == 2
    assert metrics["rollout/tool_calls"] == 1
    assert metrics["rollout/malformed_tool_calls"] == metrics["rollout/tool_timeouts"] == 0
    assert metrics["rollout/observation_tokens"] == len(tokenizer.encode(shown, add_special_tokens=False))


@pytest.mark.parametrize("fanned", [False, True])
def test_the_real_engine_continues_the_recorded_ids_and_scores_them_as_recorded(bench, tools, engine, fanned):
    folder, url = engine
    state = bench(**tools(hf_checkpoint=folder, generate_multi_samples=fanned, generate_max_turns=3))
    sent = []

    async def post(path, payload):
        # A random model calls no tool by itself: its first tokens are forced, and what follows is its own.
        forced = state.ids(call(str(len(sent))))
        sampling = {**payload["sampling_params"], "max_new_tokens": 8, "ignore_eos": True}
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            body = {**payload, "sampling_params": sampling}
            reply = (await client.post(url + path, json=body)).raise_for_status().json()
            whole = {"input_ids": payload["input_ids"] + forced, "return_logprob": True, "logprob_start_len": 0}
            whole["sampling_params"] = {"max_new_tokens": 1}
            scored = (await client.post(url + path, json=whole)).raise_for_status().json()["meta_info"]
        sent.append(payload["input_ids"])
        own = reply["meta_info"]["output_token_logprobs"]
        called = [[entry[0], entry[1], None] for entry in scored["input_token_logprobs"][-len(forced) :]]
        chosen = own if len(sent) == 3 else called
        meta = {**reply["meta_info"], "output_token_logprobs": chosen, "finish_reason": {"type": "stop"}}
        return {"text": "", "output_ids": [entry[1] for entry in chosen], "meta_info": meta}

    state.post = post
    made = state.run(ASK)
    samples = made if fanned else [made]
    assert len(sent) == 3
    for earlier, later in itertools.pairwise(sent):
        assert later[: len(earlier)] == earlier
    for sample in samples:
        sample.validate()
        score = {"input_ids": sample.tokens, "return_logprob": True, "logprob_start_len": 0}
        reply = httpx.post(f"{url}/generate", json={**score, "sampling_params": {"max_new_tokens": 1}}, timeout=30)
        scored = [entry[0] for entry in reply.json()["meta_info"]["input_token_logprobs"]][-sample.response_length :]
        wanted = [value if on else 0.0 for value, on in zip(scored, sample.loss_mask, strict=True)]
        assert sample.rollout_log_probs == pytest.approx(wanted, abs=1e-4)
    assert samples[-1].tokens[: len(sent[-1])] == sent[-1]


@pytest.mark.parametrize(("answer", "length"), [(0, 0), (0, 9), (1, 0), (1, 2)])
def test_a_conversation_that_was_cut_goes_on_as_if_it_had_not_been(bench, tools, answer, length):
    answers = [call("quick"), "done"]
    whole = bench(answers, **tools()).run()
    before, cut = answers[:answer], answers[answer]
    state = bench([*before, {"text": cut[:length], "finish": "abort"}], **tools())
    post = state.post

    async def until_enough(path, payload):
        state.aborted = len(state.requests) == answer
        return await post(path, payload)

    state.post = until_enough
    begun = state.run()
    assert begun.status is Status.ABORTED
    # As a checkpoint keeps it.
    begun = Sample.from_dict(json.loads(json.dumps(begun.to_dict())))
    state = bench([cut[length:], *answers[answer + 1 :]], **tools())
    found = state.run(begun=begun)
    assert state.requests[0][1]["input_ids"] == whole.tokens[: len(state.requests[0][1]["input_ids"])]
    for field in ("tokens", "loss_mask", "rollout_log_probs", "response_length", "status", "metadata"):
        assert getattr(found, field) == getattr(whole, field), field
