"""Agents: what they say over HTTP becomes one sample, and what they may not do is answered clearly."""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
from collections import Counter, defaultdict

import httpx
import pytest

from miles_api.errors import ConfigError, HookResultError, ServiceError
from miles_api.hooks import REGISTRY
from miles_api.loading.beside import beside
from miles_api.loading.bind import resolve
from miles_api.loading.hookset import HookSet
from miles_api.sample import Status
from miles_rollout.generate.chat_api import read_request
from miles_rollout.generate.derive import derived
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.service import RolloutWorker

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def test_a_conversation_over_http_becomes_one_sample_with_what_was_said_to_the_model_masked(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        assert (prompt, metadata) == ([USER], {"difficulty": 3})
        first = await talk.said(base_url, prompt, **request_kwargs)
        more = [*prompt, first, {"role": "user", "content": "again"}]
        reply = await talk.chat(base_url, more, **request_kwargs)
        assert reply["usage"]["completion_tokens"] == len("two") + 1
        assert reply["choices"][0]["finish_reason"] == "stop"
        return {"grade": "good"}

    state = agents(act, ["one", "two"])
    sample = state.run([USER], metadata={"difficulty": 3})
    said_all = [USER, {"role": "assistant", "content": "one"}, {"role": "user", "content": "again"}]
    whole = state.rendered([*said_all, {"role": "assistant", "content": "two"}])
    assert sample.tokens == state.ids(whole)[:-1]
    assert sample.tokens[: -sample.response_length] == state.ids(state.rendered([USER], add_generation_prompt=True))
    between = len(state.ids("\n<|im_start|>user\nagain<|im_end|>\n<|im_start|>assistant\n"))
    assert sample.loss_mask == [1] * 4 + [0] * between + [1] * 4
    assert sample.rollout_log_probs == [-0.5] * 4 + [0.0] * between + [-0.5] * 4
    assert sample.metadata == {"difficulty": 3, "turns": 2, "grade": "good"}
    assert (sample.status, sample.weight_versions) == (Status.COMPLETED, ["1"])
    assert len({payload["sampling_params"]["sampling_seed"] for _, payload in state.requests}) == 2
    assert 0 <= sample.non_generation_time < 20


def test_what_was_generated_is_never_tokenised_again(agents, kit, talk):
    other = kit.tokens.index("42")

    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        assert first["content"] == "42"
        await talk.said(base_url, [*prompt, first, USER])

    state = agents(act, [{"ids": [other]}, "ok"])
    assert state.run([USER]).tokens.count(other) == 1
    assert other in state.requests[1][1]["input_ids"]


def test_calls_in_the_answer_come_as_tool_calls_where_the_request_has_tools(agents, talk):
    text = 'adding <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'

    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.chat(base_url, prompt, tools=[TOOL])
        message = reply["choices"][0]["message"]
        assert reply["choices"][0]["finish_reason"] == "tool_calls"
        (made,) = message["tool_calls"]
        assert (message["content"], made["function"]["name"]) == ("adding", "add")
        assert json.loads(made["function"]["arguments"]) == {"a": 1}
        # Clients add fields, and write an absent text in their own way.
        message = {**message, "refusal": None, "annotations": []}
        more = [*prompt, message, {"role": "tool", "tool_call_id": made["id"], "content": "3"}]
        assert (await talk.said(base_url, more, tools=[TOOL]))["content"] == "<tool_call>nonsense"

    state = agents(act, [text, "<tool_call>nonsense"])
    sample = state.run([USER])
    shown = "\n<|im_start|>user\n<tool_response>\n3\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert shown in state.tokenizer.decode(sample.tokens)
    assert '"name": "add"' in state.tokenizer.decode(sample.tokens[: -sample.response_length])


@pytest.mark.parametrize("arguments", ['{"a": "\\ud83d"}', "[" * 3000])
def test_a_call_that_no_client_could_be_sent_comes_as_text(agents, talk, arguments):
    text = f'<tool_call>{{"name": "add", "arguments": {arguments}}}</tool_call>'

    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.said(base_url, prompt, tools=[TOOL])
        assert reply == {"role": "assistant", "content": text}
        await talk.said(base_url, [*prompt, reply, USER], tools=[TOOL])

    sample = agents(act, [text, "done"]).run([USER], limit=5000)
    assert sample.metadata["turns"] == 2


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ({"messages": []}, "at least one message"),
        ({"messages": [{"content": "x"}]}, "no role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "not text"),
        ({"messages": [USER, {"role": "assistant", "content": "x"}]}, "cannot be continued"),
        ({"messages": [USER], "n": 0}, "n 0 is not a positive number"),
        ({"messages": [USER], "n": True}, "n True is not a positive number"),
        ({"messages": [USER], "tools": "add"}, "tools is not a list"),
        ({"messages": [USER], "tools": ["add"]}, "tools is not a list"),
        ({"messages": [{"role": "user", "content": {"deep": 1}}]}, "not text"),
        ({"messages": [{"role": "assistant", "tool_calls": [3]}, USER]}, "a tool call has no function"),
        ({"messages": [{"role": "assistant", "tool_calls": 3}, USER]}, "tool_calls is not a list"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs other than 0 is not supported"),
        ({"messages": [USER], "logit_biases": {}}, "logit_biases is not supported"),
        ({"messages": [USER], "temperature": 0.2}, "temperature 0.2 instead of 1.0"),
        ({"messages": [USER], "min_p": 0.1}, "min_p 0.1 instead of 0.0"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens 0"),
        ({"messages": [USER], "stop": 5}, "stop is neither"),
        ([], "not a JSON object"),
    ],
)
def test_a_request_that_cannot_be_served_as_asked_is_refused(agents, body, problem, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            reply = await client.post(f"{base_url}/chat/completions", json=body)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert problem in reply.json()["error"]["message"]
        text = [{"type": "text", "text": "hi"}]
        await talk.said(base_url, [{"role": "user", "content": text}], n=1, user="me", seed=3, stop="x", max_tokens=7)

    state = agents(act, ["one"])
    state.run([USER])
    sampling = state.requests[0][1]["sampling_params"]
    assert (sampling["stop"], sampling["max_new_tokens"], sampling["temperature"]) == (["x"], 7, 1.0)


def test_an_agents_stop_strings_join_those_of_the_run():
    body = json.dumps({"messages": [USER], "stop": ["mine"]}).encode()
    assert read_request(body, {"stop": ["ours"]}, fixed=True).sampling["stop"] == ["ours", "mine"]


def test_in_evaluation_an_agent_may_sample_as_it_likes(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt, temperature=0.2, top_p=0.5)

    state = agents(act, ["one"])
    state.run([USER], evaluation=True)
    assert state.requests[0][1]["sampling_params"]["temperature"] == 0.2


def test_a_stream_is_one_chunk_with_the_whole_answer(agents):
    async def act(base_url, prompt, request_kwargs, metadata):
        async with httpx.AsyncClient(timeout=20, trust_env=False) as client:
            body = {"messages": prompt, "stream": True}
            reply = await client.post(f"{base_url}/chat/completions", json=body)
        assert reply.headers["content-type"].startswith("text/event-stream")
        chunk, end, rest = reply.text.split("\n\n")
        assert (end, rest) == ("data: [DONE]", "")
        assert json.loads(chunk.removeprefix("data: "))["choices"][0]["delta"]["content"] == "one"

    assert agents(act, ["one"]).run([USER]).metadata["turns"] == 1


def test_a_session_is_found_by_its_id_alone_and_ends_with_its_agent(agents, talk):
    urls = []

    async def act(base_url, prompt, request_kwargs, metadata):
        urls.append(base_url)
        assert base_url.startswith("http://127.0.0.1:")
        assert len(base_url.split("/")[-2]) >= 32
        await talk.chat(base_url.replace("/sessions/", "/sessions/x"), prompt, expect=404)
        await talk.said(base_url, prompt)

    async def main():
        state = agents(act, ["one"] * 2)
        await asyncio.gather(state.generate([USER]), state.generate([USER]))
        assert len(set(urls)) == 2
        await talk.chat(urls[0], [USER], expect=404)
        await state.hooks.aclose()
        with pytest.raises(httpx.ConnectError):
            await talk.chat(urls[0], [USER])

    asyncio.run(main())


def test_a_conversation_without_room_for_more_is_cut_off_as_a_whole(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        reply = await talk.chat(base_url, [*prompt, first, {"role": "user", "content": "x" * 100}])
        assert (reply["choices"][0]["finish_reason"], reply["choices"][0]["message"]["content"]) == ("length", "")

    state = agents(act, ["one"])
    sample = state.run([USER], limit=50)
    assert (sample.status, sample.response, sample.response_length) == (Status.TRUNCATED, "one", 4)


def test_empty_answers_count_among_the_answers_of_an_agent(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        longer = [*prompt, first, {"role": "user", "content": "x" * 100}]
        for _ in range(2):
            assert (await talk.said(base_url, longer))["content"] == ""
        reply = await talk.chat(base_url, longer, expect=409)
        assert "--agent-max-turns 3 answers" in reply["error"]["message"]

    assert agents(act, ["one"], agent_max_turns=3).run([USER], limit=50).status == Status.TRUNCATED


def test_a_sample_that_was_begun_starts_anew(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt)

    half = agents(act, ["one"]).run([USER])
    made = agents(act, ["other"]).run(begun=half)
    assert (made.response, made.response_length, made.loss_mask) == ("other", 6, [1] * 6)


def test_agents_are_served_in_each_of_several_event_loops(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt)

    state = agents(act, ["one", "two", "three"])

    async def rollout():
        return (await asyncio.wait_for(state.generate([USER]), 20)).response

    # As a rollout hook does that runs a loop of its own for each rollout.
    assert [asyncio.run(rollout()) for _ in range(2)] == ["one", "two"]
    assert state.run([USER]).response == "three"


def test_an_answer_cut_by_its_limit_says_so(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.chat(base_url, prompt, max_completion_tokens=2)
        assert reply["choices"][0]["finish_reason"] == "length"

    sample = agents(act, ["one"]).run([USER])
    assert (sample.status, sample.response) == (Status.TRUNCATED, "on")


def test_an_engine_that_fails_ends_the_generation_with_its_own_error(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.chat(base_url, prompt, expect=502)
        assert "engine is gone" in reply["error"]["message"]
        raise RuntimeError("my client gave up")

    with pytest.raises(ServiceError, match="engine is gone") as caught:
        agents(act, [ServiceError("engine is gone")]).run([USER])
    assert "my client gave up" in repr(caught.value.__cause__)


def test_what_goes_wrong_within_a_session_is_the_error_of_the_generation(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        for _ in range(2):
            reply = await talk.chat(base_url, prompt, expect=500)
        raise RuntimeError(reply["error"]["message"])

    async def post(path, payload):
        raise KeyError("a mistake of ours")

    state = agents(act, agent_max_samples=1)
    state.post = post
    with pytest.raises(KeyError, match="a mistake of ours") as caught:
        state.run([USER])
    assert "KeyError('a mistake of ours')" in str(caught.value.__cause__)


def test_an_engine_that_recovers_is_no_error(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.chat(base_url, prompt, expect=502)
        await talk.said(base_url, prompt)

    assert agents(act, [ServiceError("busy"), "one"]).run([USER]).response == "one"


def test_what_an_agent_raises_names_hook_and_sample(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt)
        raise KeyError("the agent's own")

    with pytest.raises(KeyError, match="the agent's own") as caught:
        agents(act, ["one"]).run([USER], index=5)
    notes = "\n".join(caught.value.__notes__)
    assert "raised by the agent hook" in notes
    assert "on sample 5, after 1 answers" in notes


@pytest.mark.parametrize(("returned", "asks", "problem"), [("text", 1, "not a dict"), (None, 0, "without one request")])
def test_an_agent_that_returns_nonsense_or_asks_nothing_is_named(agents, returned, asks, problem, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        for _ in range(asks):
            await talk.said(base_url, prompt)
        return returned

    with pytest.raises(HookResultError, match=rf"agent hook .*:agent returned .*{problem}|agent hook .* sample 4"):
        agents(act, ["one"]).run([USER], index=4)


@pytest.mark.parametrize("aborted", [True, False])
def test_cancelled_agents_free_their_engines_and_an_aborted_rollout_calls_abort_once(agents, stage, aborted, talk):
    outcomes = []

    async def act(base_url, prompt, request_kwargs, metadata):
        try:
            await talk.said(base_url, prompt)
        except asyncio.CancelledError:
            outcomes.append("cancelled")
            raise

    async def main():
        state = agents(act, ["one"] * 2)
        state.hold = asyncio.Event()
        tasks = [asyncio.ensure_future(state.generate([USER])) for _ in range(2)]
        while len(state.requests) < 2:
            await asyncio.sleep(0.01)
        state.aborted = aborted
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        # The requests to the engine ended too: nobody takes from the script any more.
        state.hold.set()
        await asyncio.sleep(0.05)
        assert len(state.script) == 2
        rows = {row["hook"]: row for row in state.hooks.report()}
        assert rows["agent_abort"]["calls"] == len(stage.aborted)
        await state.hooks.aclose()

    asyncio.run(main())
    assert outcomes == ["cancelled"] * 2
    assert len(stage.aborted) == (1 if aborted else 0)


def test_an_abort_that_fails_is_counted_and_said(agents, stage, capsys):
    class Refusing(list):
        def append(self, item):
            raise OSError("cannot stop")

    stage.aborted = Refusing()

    async def act(base_url, prompt, request_kwargs, metadata):
        await asyncio.Event().wait()

    async def main():
        state = agents(act)
        task = asyncio.ensure_future(state.generate([USER]))
        await asyncio.sleep(0.05)
        state.aborted = True
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert state.hooks.one("agent_abort").stats.errors == 1
        await state.hooks.aclose()

    asyncio.run(main())
    assert "agent_abort hook" in capsys.readouterr().out


def test_an_abort_beside_the_agent_is_a_hook_of_its_own(args_of, write, stage):
    reference = write(stage.hooks)
    hooks = HookSet(args_of(custom_agent_function_path=reference("agent")), CALLED_BY_LOOP, build=False)
    found = hooks.one("agent_abort")
    assert (found.spec.name, found.reference) == ("agent_abort", reference("abort"))
    assert found.origin == hooks.one("agent").origin
    imported = write("from os import abort\nasync def agent(u, p, r, m, **k): ...\n")
    owner = resolve(REGISTRY["agent"], imported("agent"))
    assert beside("agent_abort", owner) is None
    wrong = write("async def agent(u, p, r, m, **k): ...\nasync def abort(): ...\n")
    with pytest.raises(ConfigError, match=r"agent_abort .*:abort does not fit"):
        HookSet(args_of(custom_agent_function_path=wrong("agent")), CALLED_BY_LOOP, build=False)
    assert HookSet(args_of(), CALLED_BY_LOOP, build=False).one("agent_abort") is None


AGENT = """
import httpx
async def agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    messages = list(prompt)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        for question in ("really?", "sure?", None):
            body = {"messages": messages, **request_kwargs, "max_tokens": 12}
            reply = await client.post(f"{base_url}/chat/completions", json=body)
            answer = reply.raise_for_status().json()["choices"][0]["message"]
            messages += [answer, {"role": "user", "content": question}]
    return {"asked": 3}
"""


def recorded_matches(url, tokens, mask, recorded):
    """Compare the log-probs that were recorded with those of a pass over the whole sequence."""
    score = {"input_ids": tokens, "return_logprob": True, "logprob_start_len": 0}
    reply = httpx.post(f"{url}/generate", json={**score, "sampling_params": {"max_new_tokens": 1}}, timeout=30)
    scored = [entry[0] for entry in reply.json()["meta_info"]["input_token_logprobs"]][-len(mask) :]
    # What a sibling trains is masked here, with its log-probs; what was never generated has none.
    wanted = [value if on or kept else 0.0 for value, on, kept in zip(scored, mask, recorded, strict=True)]
    assert recorded == pytest.approx(wanted, abs=1e-4)


@contextlib.contextmanager
def running(configure, engine, agent, source):
    """A rollout worker whose samples come from an agent on a real engine."""
    folder, url = engine
    options = {"hf_checkpoint": folder, "data_source_path": source, "rollout_max_response_len": 300}
    config = configure(**options, custom_agent_function_path=agent)
    worker = RolloutWorker(config.replace("test", **derived(config)))
    try:
        worker.start(url)
        yield worker
    finally:
        worker.stop()


def test_a_rollout_of_agents_records_what_the_real_engine_generated(configure, engine, write, chat_source):
    with running(configure, engine, write(AGENT)("agent"), chat_source) as worker:
        batches = [worker.generate(i, "default")["batch"] for i in range(2)]
        rows = {row["hook"]: row for row in worker.report()}
    batch = batches[0]
    assert batch["tokens"] == batches[1]["tokens"], "the same seeds draw the same conversations"
    assert (rows["agent"]["calls"], rows["generate"]["calls"], len(batch["tokens"])) == (12, 12, 6)
    assert len({tuple(tokens) for tokens in batch["tokens"]}) > 1
    for tokens, mask, recorded in zip(batch["tokens"], batch["loss_masks"], batch["rollout_log_probs"], strict=True):
        recorded_matches(engine[1], tokens, mask, recorded)
        assert mask.count(0) > 2 * len("really?")
        assert 3 <= sum(mask) <= 36


BRANCHING = """
import httpx
async def agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    rewards = {}
    async with httpx.AsyncClient(timeout=60, trust_env=False, verify=False) as client:
        async def ask(messages):
            body = {"messages": messages, **request_kwargs, "max_tokens": 12}
            reply = (await client.post(f"{base_url}/chat/completions", json=body)).raise_for_status().json()
            return reply["id"], reply["choices"][0]["message"]
        _, first = await ask(prompt)
        for number in range(1 + sum(map(ord, first["content"])) % 3):
            name, answer = await ask([*prompt, first, {"role": "user", "content": f"part {number}"}])
            rewards[name] = float(number + len(answer["content"]))
    return {"rewards": rewards}
"""


def normalised(rows):
    """The reference: rollouts count once, with the mean of their samples, and each sample is measured by that."""
    rollouts = [
        statistics.fmean(r for _, other, r in rows if other == one) for one in {rollout for _, rollout, _ in rows}
    ]
    spread = statistics.stdev(rollouts) + 1e-6
    return [(reward - statistics.fmean(rollouts)) / spread for _, _, reward in rows]


def test_conversations_that_branch_unevenly_are_normalised_by_their_group(configure, engine, write, chat_source):
    with running(configure, engine, write(BRANCHING)("agent"), chat_source) as worker:
        batch = worker.generate(0, "default")["batch"]
    sizes = Counter(batch["rollout_ids"])
    assert len(sizes) == 6
    assert len(set(sizes.values())) > 1, "the conversations branch unevenly"
    rows = list(zip(batch["group_indices"], batch["rollout_ids"], batch["raw_reward"], strict=True))
    for group in set(batch["group_indices"]):
        own = [reward for one, reward in zip(batch["group_indices"], batch["rewards"], strict=True) if one == group]
        assert own == pytest.approx(normalised([row for row in rows if row[0] == group]), abs=1e-6)
    for tokens, mask, recorded in zip(batch["tokens"], batch["loss_masks"], batch["rollout_log_probs"], strict=True):
        recorded_matches(engine[1], tokens, mask, recorded)
    # The answer that several samples begin with trains in the last of them alone.
    trained = defaultdict(list)
    for rollout, mask in zip(batch["rollout_ids"], batch["loss_masks"], strict=True):
        trained[rollout].append(mask[0])
    assert all(sum(firsts) == firsts[-1] == 1 for firsts in trained.values())


@pytest.mark.parametrize(("room", "code"), [(0, None), (-1, "chat_template")])
def test_a_prompt_that_fills_the_context_is_cut_off_and_a_longer_one_refused(agents, talk, room, code):
    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.chat(base_url, prompt, expect=400 if code else 200)
        if code:
            assert reply["error"]["code"] == code
            assert "--rollout-max-context-len" in reply["error"]["message"]
            await talk.said(base_url, [{"role": "user", "content": ""}])
        else:
            more = await talk.chat(base_url, [*prompt, reply["choices"][0]["message"], USER])
            assert more["choices"][0]["finish_reason"] == "length"

    prompt = agents(act).ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
    sample = agents(act, ["o"], rollout_max_context_len=len(prompt) + room, agent_message_matching="tolerant").run(
        [USER]
    )
    assert sample.status == Status.TRUNCATED
    assert (sample.tokens == prompt) == (room == 0)
    assert len(sample.tokens) == len(prompt) + room


def test_a_body_that_is_too_large_is_refused_in_openais_form(agents, talk, monkeypatch):
    monkeypatch.setattr("miles_rollout.generate.session_server._MAX_BODY", 1 << 20)

    async def act(base_url, prompt, request_kwargs, metadata):
        reply = await talk.chat(base_url, [{"role": "user", "content": "x" * (2 << 20)}], expect=413)
        assert reply["error"]["message"] == "the body is larger than 1 MiB"
        await talk.chat(f"{base_url}/more", prompt, expect=404)
        await talk.said(base_url, prompt)

    assert agents(act, ["one"]).run([USER]).metadata["turns"] == 1
