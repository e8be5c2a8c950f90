"""A conversation sent as text reaches the engine as the tokens that were generated."""

from __future__ import annotations

import asyncio
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_router.middlewares.prefix_tokens import PrefixTokens, Texts, _Known

END = 1


class Engine:
    """Tokenises a character a token, `ab` as one; generates `ab` as two tokens, which nobody's tokeniser would."""

    def __init__(self):
        self.sent, self.tokenised, self.matched, self.has_tokenize = [], [], END, True

    def tokens(self, text):
        self.tokenised.append(text)
        pieces = text.replace("ab", "\x02").replace("</s>", "\x01")
        return [ord(piece) for piece in pieces]

    async def __call__(self, scope, receive, send):
        payload = json.loads((await receive())["body"])
        if scope["path"] == "/tokenize" and not self.has_tokenize:
            status, answer = 404, {"detail": "Not Found"}
        elif scope["path"] == "/tokenize":
            begin = [9] if payload["add_special_tokens"] else []
            status, answer = 200, {"tokens": begin + self.tokens(payload["prompt"])}
        else:
            self.sent.append(payload)
            finish = {"type": "stop", "matched": self.matched}
            meta = {"finish_reason": finish, "weight_version": "1"}
            status, answer = 200, {"text": "xab", "output_ids": [120, 97, 98, END], "meta_info": meta}
        body = json.dumps(answer).encode()
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def talk(serve, routed):
    """`talk(steps)`: run `await steps(engine, ask, r)`; `ask(text)` returns the reply."""

    def run(steps, **brought):
        async def main():
            engine = Engine()
            async with serve(engine) as url, routed(url, middleware=[PrefixTokens], brought=brought) as r:

                async def ask(said, session="a", **more):
                    payload = {"text": said, "sampling_params": {"temperature": 1}, **more}
                    return await r.post(json=payload, headers={"x-session-id": session})

                await steps(engine, ask, r)

        asyncio.run(main())

    return run


def test_the_next_turn_has_the_tokens_that_were_generated_and_only_the_rest_is_tokenised(talk):
    async def steps(engine, ask, r):
        first = (await ask("hi ab:")).json()
        assert engine.sent[0]["input_ids"] == [9, 104, 105, 32, 2, 58]
        assert engine.sent[0]["sampling_params"] == {"temperature": 1}
        assert "text" not in engine.sent[0]
        # what stopped the answer stands in the template's own text of the next turn
        second = await ask("hi ab:" + first["text"] + "</s>go ab:")
        assert engine.sent[1]["input_ids"] == [9, 104, 105, 32, 2, 58, 120, 97, 98, END, 103, 111, 32, 2, 58]
        assert second.json()["meta_info"]["prompt_token_ids"] == engine.sent[1]["input_ids"]
        assert engine.tokenised == ["hi ab:", "</s>go ab:"]
        assert second.headers["x-miles-changed-tokens"] == "test:PrefixTokens"
        third = "hi ab:xab</s>go ab:xab</s>!"
        await ask(third)
        assert engine.sent[2]["input_ids"] == [*engine.sent[1]["input_ids"], 120, 97, 98, END, 33]
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert (row["counts"]["continued"], row["counts"]["begun"]) == (2, 1)

    talk(steps)


def test_sessions_do_not_share_what_they_said(talk):
    async def steps(engine, ask, r):
        await ask("hi:")
        await ask("hi:xab!", session="b")
        assert engine.sent[1]["input_ids"] == [9, 104, 105, 58, 120, 2, 33]
        await ask("hi:xab!", session_id="c")
        assert engine.sent[2]["input_ids"] == [9, 104, 105, 58, 120, 97, 98, 33]

    talk(steps)


@pytest.mark.parametrize(
    "more",
    [{"stream": True}, {"text": ["hi:"]}, {"sampling_params": {"n": 2}}, {"sampling_params": {"no_stop_trim": 1}}],
)
def test_what_is_no_single_text_passes_as_it_is(talk, more):
    async def steps(engine, ask, r):
        await ask("hi:", **more)
        assert engine.sent == [{"text": "hi:", "sampling_params": {"temperature": 1}, **more}]
        assert engine.tokenised == []

    talk(steps)


def test_an_answer_that_a_text_stopped_is_not_continued(talk):
    async def steps(engine, ask, r):
        engine.matched = "b"
        await ask("hi:")
        await ask("hi:xab!")
        assert engine.tokenised == ["hi:", "hi:xab!"]

    talk(steps)


def test_an_engine_that_cannot_tokenise_is_named_rather_than_guessed_at(talk):
    async def steps(engine, ask, r):
        engine.has_tokenize = False
        reply = await ask("hi:")
        assert (reply.status_code, engine.sent) == (500, [])
        assert "needs the engines' /tokenize, which answered 404" in reply.text

    talk(steps)


def test_what_is_remembered_is_bounded(talk):
    async def steps(engine, ask, r):
        for number in range(20):
            await ask("word " * 20 + f"{number:03}:")
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert 0 < row["counts"]["tokens"] <= 300

    talk(steps, prefix_tokens_kept=300)


@given(st.lists(st.text("ab", max_size=200), max_size=12), st.text("ab", max_size=300))
def test_the_longest_known_beginning_is_found(texts, asked):
    known = Texts(10**9)
    for text in texts:
        known.add("s", _Known(text, [1] * len(text)))
    expected = max((text for text in texts if asked.startswith(text)), key=len, default=None)
    found = known.find("s", asked)
    assert (None if found is None else found.text) == expected
    assert known.tokens == sum(map(len, set(texts)))
