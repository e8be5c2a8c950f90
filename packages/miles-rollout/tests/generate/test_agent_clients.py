"""Agents as users have them: OpenAI's client, programs of their own, models that think aloud."""

from __future__ import annotations

import asyncio
import json
import sys

import openai
import pytest

from miles_api.errors import DataError
from miles_rollout.generate.chat import ChatTemplate
from miles_rollout.tokenizers import load_tokenizer

USER = {"role": "user", "content": "hi"}
AGAIN = {"role": "user", "content": "again"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = '<tool_call>{"name": "add", "arguments": {"a": 1, "b": [2, "x"]}}</tool_call>'


def client_of(base_url):
    return openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0, timeout=20)


def test_openais_own_client_holds_a_conversation_with_tools_and_streams(agents):
    async def act(base_url, prompt, request_kwargs, metadata):
        async with client_of(base_url) as client:
            (model,) = (await client.models.list()).data
            assert model.id == request_kwargs["model"]
            create = client.chat.completions.create
            messages = list(prompt)
            reply = await create(messages=messages, tools=[TOOL], **request_kwargs)
            (made,) = reply.choices[0].message.tool_calls
            assert json.loads(made.function.arguments) == {"a": 1, "b": [2, "x"]}
            messages += [reply.choices[0].message, {"role": "tool", "tool_call_id": made.id, "content": "3"}]
            stream = await create(messages=messages, tools=[TOOL], stream=True, **request_kwargs)
            text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            assert text == "3"
            messages += [{"role": "assistant", "content": text}, USER]
            more = await create(messages=messages, tools=[TOOL], **request_kwargs)
            assert more.usage.completion_tokens == len("fine") + 1

    sample = agents(act, [CALL, "3", "fine"]).run([USER])
    assert sample.metadata["turns"] == 3


def test_openais_own_client_reads_several_choices_their_log_probs_and_what_is_refused(agents):
    async def act(base_url, prompt, request_kwargs, metadata):
        async with client_of(base_url) as client:
            reply = await client.chat.completions.create(messages=prompt, n=2, logprobs=True, **request_kwargs)
            assert sorted(choice.message.content for choice in reply.choices) == ["one", "two"]
            for choice in reply.choices:
                content = choice.logprobs.content
                assert "".join(entry.token for entry in content[:3]) == choice.message.content
                assert [entry.logprob for entry in content] == [-0.5] * 4
            stream = await client.chat.completions.create(messages=[*prompt, USER], n=2, stream=True, **request_kwargs)
            async for chunk in stream:
                assert [choice.index for choice in chunk.choices] == [0, 1]
            with pytest.raises(openai.BadRequestError, match=r"temperature 0\.1 instead of 1"):
                await client.chat.completions.create(messages=prompt, model="m", temperature=0.1)
            with pytest.raises(openai.ConflictError, match="--agent-max-samples 4"):
                await client.chat.completions.create(messages=[AGAIN], model="m")

    assert len(agents(act, ["one", "two", "three", "four"], agent_max_samples=4).run([USER])) == 4


# It knows nothing of us: an address in the environment, and a history that it writes its own way.
BLACK_BOX = """
import json, os
from openai import OpenAI
client = OpenAI(base_url=os.environ["OPENAI_BASE_URL"], api_key="x", max_retries=0, timeout=20)
tools = json.loads(os.environ["TOOLS"])
history = [{"role": "user", "content": [{"type": "text", "text": os.environ["ASK"]}]}]
for number in range(3):
    reply = client.chat.completions.create(model="any", messages=history, tools=tools).choices[0].message
    mine = {"role": "assistant", "content": (reply.content or "").strip() or None, "name": None}
    if reply.tool_calls:
        calls = []
        for call in reply.tool_calls:
            arguments = dict(reversed(json.loads(call.function.arguments).items()))
            function = {"name": call.function.name, "arguments": json.dumps(arguments, indent=1)}
            calls.append({"type": "function", "id": f"mine-{number}", "function": function})
        mine["tool_calls"] = calls
        mine["content"] = None
        history += [mine, {"role": "tool", "tool_call_id": f"mine-{number}", "content": "3", "name": "add"}]
    else:
        history += [mine, {"role": "user", "content": "go on"}]
print(len(history))
"""
SCRIPT = [f"let me see \n{CALL}", "  it is 3 \n", "done"]


def black_box(agents, tmp_path, **options):
    file = tmp_path / "black_box.py"
    file.write_text(BLACK_BOX)

    async def act(base_url, prompt, request_kwargs, metadata):
        place = {"OPENAI_BASE_URL": base_url, "TOOLS": json.dumps([TOOL]), "ASK": prompt[0]["content"], "NO_PROXY": "*"}
        program = await asyncio.create_subprocess_exec(
            sys.executable, str(file), env=place, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
        out, errors = await program.communicate()
        assert program.returncode == 0, errors.decode()
        return {"said": int(out)}

    state = agents(act, SCRIPT, **options)
    return state, state.run([USER])


def test_a_program_that_writes_its_history_anew_is_one_sample_where_matching_is_tolerant(agents, tmp_path):
    state, sample = black_box(agents, tmp_path, agent_message_matching="tolerant")
    answers = [[*state.ids(text), state.tokenizer.eos_token_id] for text in SCRIPT]
    assert sample.loss_mask.count(1) == sum(map(len, answers))
    trained = [
        token for token, on in zip(sample.tokens[-sample.response_length :], sample.loss_mask, strict=True) if on
    ]
    assert trained == [token for ids in answers for token in ids]
    # What the engine saw is what was recorded, not what the program made of it.
    for number, (_, payload) in enumerate(state.requests):
        sent = payload["input_ids"]
        assert sample.tokens[: len(sent)] == sent
        assert sample.tokens[len(sent) : len(sent) + len(answers[number])] == answers[number]
    assert (sample.metadata["turns"], sample.metadata["rewritten_messages"]) == (3, 2)


def test_a_program_that_writes_its_history_anew_is_a_sample_each_turn_where_matching_is_exact(agents, tmp_path):
    state, made = black_box(agents, tmp_path)
    assert [sample.metadata["turns"] for sample in made] == [1, 1, 1]
    assert [sample.tokens[: -sample.response_length] for sample in made] == [p["input_ids"] for _, p in state.requests]
    assert all(0 not in sample.loss_mask for sample in made)


THOUGHT = "<think>\nhm\n</think>\n\nyes"


@pytest.fixture(scope="module")
def thinking_dir(tmp_path_factory, kit):
    """A template in the manner of Qwen3: it knows thoughts, and drops those before the last question."""
    shown = "{% if m.reasoning_content and loop.last %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    return kit.save_tokenizer(
        tmp_path_factory.mktemp("thinking"), kit.template.replace("{{ m.content", shown + "{{ m.content", 2)
    )


def conversation(agents, talk, keep, folder, **options):
    async def act(base_url, prompt, request_kwargs, metadata):
        first = await talk.said(base_url, prompt)
        assert first == {"role": "assistant", "content": "yes", "reasoning_content": "hm"}
        await talk.said(base_url, [*prompt, keep(first), AGAIN])

    state = agents(act, [THOUGHT, "two"], hf_checkpoint=folder, **options)
    return state, state.run([USER])


def without_thought(message):
    return {"role": "assistant", "content": message["content"]}


def test_a_thought_that_a_client_sends_back_stays_what_the_model_sees(agents, talk, thinking_dir):
    state, sample = conversation(agents, talk, dict, thinking_dir)
    assert THOUGHT in state.tokenizer.decode(state.requests[1][1]["input_ids"])
    assert (sample.metadata, sum(sample.loss_mask)) == ({"turns": 2}, len(THOUGHT) + len("two") + 2)


def test_the_message_of_openais_client_sends_the_thought_back(agents, thinking_dir):
    async def act(base_url, prompt, request_kwargs, metadata):
        async with client_of(base_url) as client:
            first = await client.chat.completions.create(messages=prompt, **request_kwargs)
            await client.chat.completions.create(messages=[*prompt, first.choices[0].message, AGAIN], **request_kwargs)

    state = agents(act, [THOUGHT, "two"], hf_checkpoint=thinking_dir)
    assert state.run([USER]).metadata == {"turns": 2}
    assert THOUGHT in state.tokenizer.decode(state.requests[1][1]["input_ids"])


def test_a_thought_that_a_client_leaves_out_is_not_what_the_model_sees(agents, talk, thinking_dir):
    state, made = conversation(agents, talk, without_thought, thinking_dir)
    said = [USER, {"role": "assistant", "content": "yes"}, AGAIN]
    assert state.requests[1][1]["input_ids"] == state.ids(state.rendered(said, add_generation_prompt=True))
    assert [sum(sample.loss_mask) for sample in made] == [len(THOUGHT) + 1, len("two") + 1]


def test_tolerant_matching_keeps_a_thought_that_a_client_leaves_out(agents, talk, thinking_dir):
    state, sample = conversation(agents, talk, without_thought, thinking_dir, agent_message_matching="tolerant")
    assert THOUGHT in state.tokenizer.decode(state.requests[1][1]["input_ids"])
    assert sample.metadata == {"turns": 2, "rewritten_messages": 1}


def test_a_template_that_knows_no_thoughts_leaves_them_in_the_text(agents, talk):
    async def act(base_url, prompt, request_kwargs, metadata):
        assert await talk.said(base_url, prompt) == {"role": "assistant", "content": THOUGHT}

    agents(act, [THOUGHT]).run([USER])


THINKS = "<think>\n\n</think>\n\n"
LEAN = "{{ m.content }}"


@pytest.mark.parametrize(
    ("template", "renderings"),
    [
        (None, 3 + 1 + 1),
        # As Qwen3's does: an answer that is the last begins with a thought, be it an empty one.
        (f"{{% if m.role == 'assistant' and loop.last %}}{THINKS}{{% endif %}}{LEAN}", 3 + 1 + 1),
        (f"{{% if m.role == 'assistant' %}}{THINKS}{{% endif %}}{LEAN}", 3 + 3 + 3),
    ],
)
def test_a_turn_is_rendered_once_where_the_template_appends_and_to_the_same_ids(kit, tmp_path, template, renderings):
    saved = kit.save_tokenizer(tmp_path / "model", kit.template.replace(LEAN, template) if template else kit.template)
    tokenizer, count = load_tokenizer(saved), []
    render = tokenizer.apply_chat_template
    tokenizer.apply_chat_template = lambda *given, **more: (count.append(1), render(*given, **more))[1]
    chat = ChatTemplate(tokenizer, {})
    messages, seen = [{"role": "system", "content": "be"}, USER], None
    for number in range(3):
        new = [{"role": "tool", "content": f"{number}"}, {"role": "user", "content": f"and {number}?"}]
        more = chat.continuation(messages, new, seen)
        seen, renders = more.seen, len(count)
        assert more == chat.continuation(messages, new)
        del count[renders:]
        messages += [{"role": "assistant", "content": f"a{number}"}, *new]
    assert len(count) == renderings


@pytest.mark.parametrize("forgets", ["loop.revindex > 4", "loop.index == 3 and loop.revindex == 3"])
def test_what_a_template_rewrites_later_is_noticed_in_any_turn(kit, tmp_path, forgets):
    # The first turn appends. In the second the first message is forgotten, or the one that the first turn added.
    forget = f"{{{{ '' if {forgets} else m.content }}}}"
    chat = ChatTemplate(load_tokenizer(kit.save_tokenizer(tmp_path / "m", kit.template.replace(LEAN, forget))), {})
    first = chat.continuation([USER], [AGAIN])
    with pytest.raises(DataError, match="no prefix property"):
        chat.continuation([USER, {"role": "assistant", "content": "an answer"}, AGAIN], [USER], first.seen)
