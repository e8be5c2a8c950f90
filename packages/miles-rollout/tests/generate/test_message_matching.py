"""Which accounts of a message stand for the recorded one."""

from __future__ import annotations

import pytest

from miles_rollout.generate.chat_api import plain_message
from miles_rollout.generate.message_matching import same, similar


def called(arguments, content="see", **more):
    call = {"id": "call_1_0", "type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [{**call, **more}]}


ANSWER = {"role": "assistant", "content": "<think>a</think>\n\nit is so\n"}
OUTPUT = {"role": "tool", "tool_call_id": "call_1_0", "name": "add", "content": "3"}
ASK = {"role": "user", "name": "Ann", "content": "why?"}


@pytest.mark.parametrize(
    ("recorded", "sent"),
    [
        (ANSWER, {**ANSWER, "content": " it is so"}),
        (ANSWER, {**ANSWER, "content": [{"type": "text", "text": "it is so"}], "refusal": None}),
        ({**ANSWER, "reasoning_content": "b"}, {**ANSWER}),
        (called('{"a": 1, "b": 2}'), called('{"b":2,"a":1}', id="other")),
        (called('{"a": 1}'), called('{"a": 1}', content=None)),
        (called("{bad "), called("{bad")),
        (OUTPUT, {"role": "tool", "tool_call_id": "other", "content": "3\n"}),
        (ASK, {"role": "user", "content": "why?"}),
    ],
)
def test_what_a_client_wrote_anew_is_recognised_by_tolerant_matching_alone(recorded, sent):
    recorded, sent = plain_message(recorded), plain_message(sent)
    assert similar(recorded, sent)
    assert not same(recorded, sent)


@pytest.mark.parametrize(
    ("recorded", "sent"),
    [
        (ANSWER, {**ANSWER, "content": "it is not so"}),
        (ANSWER, {**ANSWER, "role": "user"}),
        (called('{"a": 1}'), called('{"a": 2}')),
        (called('{"a": 1}'), called('{"a": 1}', content="another text")),
        (called('{"a": 1}'), {"role": "assistant", "content": "see"}),
        (OUTPUT, {**OUTPUT, "content": "4"}),
        (ASK, {**ASK, "name": "Bob"}),
        ({"role": "user", "content": "x"}, {"role": "user", "content": ""}),
    ],
)
def test_another_content_is_another_message(recorded, sent):
    recorded, sent = plain_message(recorded), plain_message(sent)
    assert not similar(recorded, sent)
    assert not same(recorded, sent)


@pytest.mark.parametrize(
    "sent",
    [
        {**ASK, "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]},
        {**ASK, "tool_calls": None, "audio": None},
    ],
)
def test_empty_fields_and_text_in_parts_are_no_difference_even_to_exact_matching(sent):
    assert same(plain_message(ASK), plain_message(sent))
