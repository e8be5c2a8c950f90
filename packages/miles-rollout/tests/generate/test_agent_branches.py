"""Agents whose conversations branch: each end is a sample, of exactly what the engine was given and generated."""

from __future__ import annotations

import asyncio
import json
import random

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_api.errors import HookResultError, ServiceError
from miles_api.sample import Status

USER = {"role": "user", "content": "hi"}
AGAIN = {"role": "user", "content": "again"}


class Engine:
    """Answers with random ids, each with a log-prob of its own, and keeps what it was given and said."""

    def __init__(self, state, *, seed=0):
        self.state, self.random = state, random.Random(seed)
        self.calls, self.waiting, self.cancelled = [], 0, 0
        self.hold = None
        state.post = self.post

    async def post(self, path, payload):
        call = {"input": list(payload["input_ids"]), "seed": payload["sampling_params"]["sampling_seed"]}
        try:
            self.waiting += 1
            if self.hold is not None:
                await self.hold.wait()
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        letters = self.state.ids("abcdefghijklmnopqrstuvwxyz")
        call["ids"] = [self.random.choice(letters) for _ in range(6)] + [self.state.tokenizer.eos_token_id]
        call["log_probs"] = [-self.random.random() for _ in call["ids"]]
        self.calls.append(call)
        pairs = zip(call["log_probs"], call["ids"], strict=True)
        meta = {"finish_reason": {"type": "stop"}, "weight_version": "1", "prompt_tokens": len(call["input"])}
        meta["output_token_logprobs"] = [[value, token, None] for value, token in pairs]
        text = self.state.tokenizer.decode(call["ids"], skip_special_tokens=True)
        return {"text": text, "output_ids": call["ids"], "meta_info": meta}


def places(call, samples, *, trained):
    """Return the samples that hold a generation where the engine made it, with its log-probs, trained or not."""
    size, found = len(call["ids"]), []
    for number, sample in enumerate(samples):
        first = len(call["input"])
        at = first - (len(sample.tokens) - sample.response_length)
        if at < 0 or sample.tokens[: first + size] != call["input"] + call["ids"]:
            continue
        assert sample.rollout_log_probs[at : at + size] == call["log_probs"]
        if sample.loss_mask[at : at + size] == [int(trained)] * size:
            found.append(number)
    return found


def assert_each_token_trains_once(samples, calls):
    for call in calls:
        assert len(places(call, samples, trained=True)) == 1
    assert sum(sum(sample.loss_mask) for sample in samples) == sum(len(call["ids"]) for call in calls)


def as_list(made):
    return made if isinstance(made, list) else [made]


@pytest.fixture
def branching(agents):
    """`branching(act, **options)`: the samples of one session, and the engine that served it."""

    def run(act, **options):
        state = agents(act, **options)
        engine = Engine(state)
        return as_list(state.run([USER], index=7)), engine

    return run


def test_a_retry_an_edited_answer_and_a_sub_agent_are_samples_of_one_rollout(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        await talk.said(base_url, [*prompt, first, AGAIN])
        await talk.said(base_url, [*prompt, first, {**AGAIN, "content": "another way"}])
        await talk.said(base_url, [*prompt, {**first, "content": "never said"}, AGAIN])
        await talk.said(base_url, [{"role": "system", "content": "be another"}, *prompt])

    samples, engine = branching(act)
    assert [places(call, samples, trained=True) for call in engine.calls] == [[1], [0], [1], [2], [3]]
    # The first answer leads to two ends: the later one trains it, the other shows it.
    assert places(engine.calls[0], samples, trained=False) == [0]
    assert_each_token_trains_once(samples, engine.calls)
    assert [sample.metadata["turns"] for sample in samples] == [2, 2, 1, 1]
    assert [(sample.metadata["branch"], sample.metadata["branches"]) for sample in samples] == [
        (i, 4) for i in range(4)
    ]
    assert {(s.index, s.group_index, s.rollout_id, s.status) for s in samples} == {(7, 0, None, Status.COMPLETED)}
    # What the model did not say is the prompt of the conversation that it begins.
    edited, sub_agent = samples[2], samples[3]
    assert "never said" in engine.state.tokenizer.decode(edited.tokens[: -edited.response_length])
    assert "be another" in engine.state.tokenizer.decode(sub_agent.tokens[: -sub_agent.response_length])
    assert len({call["seed"] for call in engine.calls}) == 5


def test_the_same_request_again_is_another_draw(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        for _ in range(3):
            await talk.said(base_url, prompt)
        reply = await talk.chat(base_url, prompt, n=2)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1]
        assert reply["usage"]["completion_tokens"] == 14

    samples, engine = branching(act)
    assert len(samples) == len({call["seed"] for call in engine.calls}) == 5
    assert len({tuple(sample.tokens) for sample in samples}) == 5
    assert_each_token_trains_once(samples, engine.calls)


STEP = st.tuples(
    st.integers(0, 7), st.sampled_from(["grow", "edit", "system", "retry"]), st.integers(1, 2), st.sampled_from("xyz")
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEP, min_size=1, max_size=8))
def test_whatever_an_agent_does_each_generated_token_trains_exactly_once(branching, talk, steps):
    talks = []  # conversations, as the agent knows them; each with how many recorded ones it continued

    def request(number, kind, word):
        """Return the messages of a step: those of an earlier answer, continued or changed."""
        if not talks or kind == "system":
            return [{"role": "system", "content": word}, USER]
        past = talks[number % len(talks)]
        if kind == "retry":
            return past[:-1]
        if kind == "edit":
            past = [*past[:-1], {"role": "assistant", "content": word}]
        return [*past, {"role": "user", "content": word}]

    async def act(base_url, prompt, request_kwargs, metadata):
        for number, kind, n, word in steps:
            messages = request(number, kind, word)
            reply = await talk.chat(base_url, messages, n=n)
            talks.extend([*messages, choice["message"]] for choice in reply["choices"])

    samples, engine = branching(act, agent_max_samples=32)
    assert_each_token_trains_once(samples, engine.calls)

    # A conversation ends where none of the others goes on from its answer: the reference of which are samples.
    def goes_on(one, other):
        return len(other) > len(one) and other[: len(one)] == one

    ends = [one for one in talks if not any(goes_on(one, other) for other in talks)]
    assert len(samples) == len(ends)
    assert all(sample.response_length and sum(sample.loss_mask) for sample in samples)


def test_a_template_that_rewrites_earlier_messages_makes_each_turn_a_sample_of_its_own(branching, talk, kit, tmp_path):
    rewriting = kit.template.replace("{{ m.content }}", "{{ m.content if loop.last or m.role != 'user' else '…' }}")
    folder = kit.save_tokenizer(tmp_path / "rewriting", rewriting)

    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        await talk.said(base_url, [*prompt, first, AGAIN])

    samples, engine = branching(act, hf_checkpoint=folder)
    said = [USER, {"role": "assistant", "content": engine.state.tokenizer.decode(engine.calls[0]["ids"][:-1])}, AGAIN]
    assert engine.calls[1]["input"] == engine.state.ids(engine.state.rendered(said, add_generation_prompt=True))
    assert [places(call, samples, trained=True) for call in engine.calls] == [[0], [1]]


def refused(base_url, messages, **more):
    with httpx.Client(timeout=20, trust_env=False) as client:
        reply = client.post(f"{base_url}/chat/completions", json={"messages": messages, **more})
    # OpenAI's own client would send it again, and again be refused.
    assert (reply.status_code, reply.headers["x-should-retry"]) == (409, "false")
    return reply.json()["error"]["message"]


def test_a_session_that_may_have_no_more_samples_says_which_message_differs(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        ask = asyncio.to_thread
        edited = await ask(refused, base_url, [*prompt, {**first, "content": "I never said that"}, USER])
        assert edited.startswith("message 1 is not as this session recorded it: sent {")
        assert "--agent-max-samples 1 of them" in edited
        assert "nothing is new" in await ask(refused, base_url, prompt)
        assert "n 2 asks" in await ask(refused, base_url, [*prompt, first, AGAIN], n=2)
        await talk.said(base_url, [*prompt, first, AGAIN])

    (sample,), engine = branching(act, agent_max_samples=1)
    assert (sample.metadata, len(engine.calls)) == ({"turns": 2}, 2)


def test_a_session_has_so_many_answers_and_no_more(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        await talk.said(base_url, [*prompt, first, AGAIN])
        assert "--agent-max-turns 2" in await asyncio.to_thread(refused, base_url, prompt)

    samples, _ = branching(act, agent_max_turns=2)
    assert len(samples) == 1


def test_an_agent_scores_its_conversations_by_the_answers_in_them(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        solver = await talk.chat(base_url, prompt)
        judge = await talk.chat(base_url, [{"role": "system", "content": "judge"}, USER])
        several = await talk.chat(base_url, [{"role": "system", "content": "draw"}, USER], n=2)
        rewards = {solver["id"]: 1.0, judge["id"]: {"fair": 0.5}, f"{several['id']}/1": -1.0}
        return {"reward": 0.25, "rewards": rewards, "note": "x"}

    samples, _ = branching(act)
    assert [sample.reward for sample in samples] == [1.0, {"fair": 0.5}, 0.25, -1.0]
    assert all(sample.metadata["note"] == "x" and "rewards" not in sample.metadata for sample in samples)


def test_the_last_named_answer_of_a_conversation_decides_its_reward(branching, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.chat(base_url, prompt)
        answer = first["choices"][0]["message"]
        second = await talk.chat(base_url, [*prompt, answer, AGAIN])
        await talk.said(base_url, [*prompt, answer, USER])
        return {"rewards": {first["id"]: 1.0, second["id"]: 2.0}}

    samples, _ = branching(act)
    assert [sample.reward for sample in samples] == [2.0, 1.0]


def test_an_evaluation_counts_each_run_of_an_agent_once_by_its_last_conversation(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.chat(base_url, prompt)
        last = await talk.chat(base_url, [{"role": "system", "content": "judge"}, *prompt])
        return {"rewards": {first["id"]: 1.0, last["id"]: 2.0}}

    made = agents(act, ["one", "two"]).run([USER], evaluation=True)
    assert (made.response, made.reward, made.metadata["branches"]) == ("two", 2.0, 2)


@pytest.mark.parametrize(("rewards", "problem"), [({"chatcmpl-9": 1.0}, "chatcmpl-9"), ([1.0], "not a mapping")])
def test_a_reward_for_nothing_that_was_said_is_an_error_of_the_agent(branching, talk, rewards, problem):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt)
        return {"rewards": rewards}

    with pytest.raises(HookResultError, match=rf"agent hook .*{problem}"):
        branching(act)


async def until(condition):
    while not condition():
        await asyncio.sleep(0.01)


def test_requests_of_one_session_are_served_at_the_same_time(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        system = [[{"role": "system", "content": word}, *prompt] for word in "abc"]
        tasks = [asyncio.ensure_future(talk.said(base_url, messages)) for messages in system]
        await until(lambda: engine.waiting == 3)
        engine.hold.set()
        first = await asyncio.gather(*tasks)
        grown = ([*m, a, AGAIN] for m, a in zip(system, first, strict=True))
        await asyncio.gather(*(talk.said(base_url, messages) for messages in grown))

    async def main():
        engine.hold = asyncio.Event()
        made = await state.generate([USER])
        await state.hooks.aclose()
        return made

    state = agents(act)
    engine = Engine(state)
    samples = asyncio.run(main())
    assert [sample.metadata["turns"] for sample in samples] == [2, 2, 2]
    assert_each_token_trains_once(samples, engine.calls)
    assert all(sample.non_generation_time >= 0 for sample in samples)


def test_a_client_that_hangs_up_frees_the_engine_and_leaves_no_trace(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        left = asyncio.ensure_future(talk.said(base_url, prompt))
        await until(lambda: engine.waiting == 1)
        left.cancel()
        await until(lambda: engine.cancelled == 1)
        engine.hold.set()
        await talk.said(base_url, prompt)

    async def main():
        engine.hold = asyncio.Event()
        made = await state.generate([USER])
        await state.hooks.aclose()
        return made

    state = agents(act)
    engine = Engine(state)
    sample = asyncio.run(main())
    assert (sample.metadata, len(engine.calls)) == ({"turns": 1}, 1)


@pytest.mark.parametrize("answers", [0, 1])
@pytest.mark.parametrize("gives_up", [True, False])
def test_a_rollout_that_is_over_keeps_what_was_said_until_then(agents, talk, answers, gives_up):
    async def act(base_url, prompt, request_kwargs, metadata):
        messages = list(prompt)
        for _ in range(answers):
            messages += [await talk.said(base_url, messages), AGAIN]
        state.aborted = True
        reply = await talk.chat(base_url, messages, expect=503)
        assert reply["error"]["code"] == "aborted"
        if gives_up:
            raise RuntimeError("cannot go on")

    state = agents(act)
    engine = Engine(state)
    sample = state.run([USER])
    assert (sample.status, len(engine.calls)) == (Status.ABORTED, answers)
    assert sample.response_length == 7 * answers


def test_an_answer_that_the_engine_aborts_is_kept_as_far_as_it_came(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.chat(base_url, prompt, expect=503)

    sample = agents(act, [{"text": "half", "finish": "abort"}]).run([USER])
    assert (sample.status, sample.response, sample.loss_mask) == (Status.ABORTED, "half", [1] * 4)


def test_a_failed_answer_leaves_the_others_of_its_session(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        await talk.said(base_url, prompt)
        await talk.chat(base_url, prompt, n=2, expect=502)
        await talk.said(base_url, prompt)

    made = agents(act, ["one", "two", ServiceError("busy"), "three"]).run([USER])
    assert [sample.response for sample in made] == ["one", "three"]


def test_sixty_four_sessions_at_once_keep_apart(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        messages = list(prompt)
        for _ in range(3):
            messages += [await talk.said(base_url, messages), {"role": "user", "content": metadata["word"]}]
        await talk.said(base_url, [*prompt, USER])
        return {"heard": json.dumps([m["content"] for m in messages if m["role"] == "assistant"])}

    async def main():
        words = [f"word{number}x" for number in range(64)]
        made = await asyncio.gather(
            *(state.generate([USER], index=i, metadata={"word": word}) for i, word in enumerate(words))
        )
        await state.hooks.aclose()
        return dict(zip(words, made, strict=True))

    state = agents(act)
    engine = Engine(state)
    made = asyncio.run(main())
    assert len(engine.calls) == 64 * 4
    for word, (grown, _) in made.items():
        text = state.tokenizer.decode(grown.tokens)
        assert text.count("<|im_start|>user\nword") == text.count(f"<|im_start|>user\n{word}<|im_end|>") == 2
        assert all(answer in text for answer in json.loads(grown.metadata["heard"]))
    trained = sum(sum(sample.loss_mask) for pair in made.values() for sample in pair)
    assert trained == sum(len(call["ids"]) for call in engine.calls)
