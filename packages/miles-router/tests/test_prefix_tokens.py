"""A conversation sent as text reaches the engine as the tokens that were generated."""

from __future__ import annotations

import asyncio
import json
from array import array

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_router.middlewares.prefix_tokens import TEXT_COST, PrefixTokens, Texts

END = 1


class Engine:
    """Tokenises a character a token, `ab` as one; generates `ab` as two tokens, which nobody's tokeniser would."""

    def __init__(self):
        self.sent, self.tokenised, self.matched = [], [], END
        self.space, self.dies = "", None
        """What the tokenizer puts before every text, as SentencePiece does; the path of what is answered by half."""
        self.refusals = {}
        """Status and headers of what is answered instead, by path."""

    def tokens(self, text):
        if not text.endswith("\na"):  # which is what the tokenizer is tried with
            self.tokenised.append(text)
        text = self.space + text
        pieces = text.replace("ab", "\x02").replace("</s>", "\x01")
        return [ord(piece) for piece in pieces]

    async def __call__(self, scope, receive, send):
        payload = json.loads((await receive())["body"])
        headers = []
        if scope["path"] in self.refusals:
            status, headers = self.refusals[scope["path"]]
            answer = {"detail": "no"}
        elif scope["path"] == "/tokenize":
            begin = [9] if payload["add_special_tokens"] else []
            status, answer = 200, {"tokens": begin + self.tokens(payload["prompt"])}
        else:
            self.sent.append(payload)
            finish = {"type": "stop", "matched": self.matched}
            meta = {"finish_reason": finish, "weight_version": "1"}
            status, answer = 200, {"text": "xab", "output_ids": [120, 97, 98, END], "meta_info": meta}
        body = json.dumps(answer).encode()
        if self.dies == scope["path"]:
            self.dies, body, headers = None, body[:9], [(b"content-length", str(len(body)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": body, "more_body": True})
            return
        await send({"type": "http.response.start", "status": status, "headers": headers})
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
    [
        {"stream": True},
        {"text": ["hi:"]},
        {"sampling_params": {"n": 2}},
        {"sampling_params": {"no_stop_trim": 1}},
        {"image_data": "x.png"},
        {"audio_data": ["x.wav"]},
        {"input_embeds": [[0.5]]},
    ],
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
        engine.refusals["/tokenize"] = 404, []
        reply = await ask("hi:")
        assert (reply.status_code, engine.sent) == (500, [])
        assert "needs the engines' /tokenize, which answered 404" in reply.text

    talk(steps)


@pytest.mark.parametrize("path", ["/generate", "/tokenize"])
def test_an_answer_that_its_engine_did_not_finish_is_not_finished_here_either(talk, path):
    async def steps(engine, ask, r):
        engine.dies = path
        with pytest.raises(httpx.RemoteProtocolError):
            await ask("hi:")
        assert engine.dies is None
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert (row["errors"], row["counts"]["tokens"]) == (0, 0)
        assert (await ask("hi:")).json()["text"] == "xab"

    talk(steps)


@pytest.mark.parametrize("path", ["/generate", "/tokenize"])
def test_who_cannot_be_served_now_is_told_so_and_when_to_come_again(talk, path):
    async def steps(engine, ask, r):
        engine.refusals[path] = 503, [(b"retry-after", b"7")]
        reply = await ask("hi:")
        assert (reply.status_code, reply.json(), reply.headers["retry-after"]) == (503, {"detail": "no"}, "7")
        r.app.registry.remove((await r.workers())[0]["url"])
        nobody = await ask("hi:")
        assert (nobody.status_code, nobody.json()["error"]["type"]) == (503, "no_worker")
        assert "retry-after" in nobody.headers
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert row["errors"] == 0

    talk(steps)


def test_a_tokenizer_that_puts_a_space_before_each_text_is_left_to_its_engine(talk):
    async def steps(engine, ask, r):
        engine.space = "_"
        for said in ("hi:", "hi:xab!"):
            await ask(said)
            assert engine.sent[-1] == {"text": said, "sampling_params": {"temperature": 1}}
        assert engine.tokenised == []
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert row["counts"]["passed"] == 2

    talk(steps)


def test_what_is_remembered_is_bounded(talk):
    async def steps(engine, ask, r):
        for number in range(20):
            await ask("word " * 20 + f"{number:03}:")
        (row,) = (await r.client.get("/hooks")).json()["hooks"]
        assert 0 < row["counts"]["tokens"] <= 300

    talk(steps, prefix_tokens_kept=300)


def test_texts_of_no_tokens_are_bounded_too_and_the_one_unused_for_longest_goes():
    known = Texts(3 * TEXT_COST)
    for session in "abcad":
        known.add(session, "", array("i"))
    assert [known.find(session, "x") is not None for session in "abcd"] == [True, False, True, True]


class _Watched(dict):
    def __init__(self, of, asked):
        super().__init__(of)
        self.asked = asked

    def get(self, key, default=None):
        self.asked.append(key)
        return super().get(key, default)

    def items(self):
        raise AssertionError("all of them were looked at")

    values = __iter__ = items

    def move_to_end(self, key):
        pass


def test_a_short_text_is_not_compared_with_every_other_short_text():
    known = Texts(10**9)
    for number in range(5000):
        known.add("", f"What is {number}?", array("i", [1]))
    compared = []
    known._known = _Watched(known._known, compared)
    assert known.find("", "Another question?") is None
    assert known.find("", "What is 4999? Well").length == len("What is 4999?")
    assert len(compared) <= 2 * 64


@given(st.lists(st.text("ab", max_size=200), max_size=12), st.text("ab", max_size=300))
def test_the_longest_known_beginning_is_found(texts, asked):
    known = Texts(10**9)
    for text in texts:
        known.add("s", text, array("i", [1] * len(text)))
    expected = max((text for text in texts if asked.startswith(text)), key=len, default=None)
    found = known.find("s", asked)
    assert (None if found is None else asked[: found.length]) == expected
    assert known.size == sum(len(text) + TEXT_COST for text in set(texts))
