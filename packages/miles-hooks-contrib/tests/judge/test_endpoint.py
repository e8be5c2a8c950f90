"""A judge that fails: what is asked again, what is an error at once, and when it ends."""

import asyncio

import pytest

from miles_api.errors import ConfigError, ServiceError
from miles_api.testing import hook_args, make_sample

pytest.importorskip("aiohttp")
from miles_hooks_contrib.llm_judge import LlmJudge

from .conftest import breaks_off, fails, never_answers, says


def test_the_key_comes_from_the_environment_and_no_error_shows_it(ask, judge, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    with pytest.raises(ServiceError) as caught:
        ask(answers=[fails(401, b"no")], judge_key_variable="JUDGE_KEY")
    assert judge.headers[0][1]["Authorization"] == "Bearer sk-very-secret"
    assert "secret" not in str(caught.value)
    ask()
    assert "Authorization" not in judge.headers[-1][1]


def test_a_key_variable_that_is_not_set_is_refused(monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ConfigError, match="JUDGE_KEY: this environment variable is not set"):
        LlmJudge(hook_args(LlmJudge, judge_url="http://x/v1", judge_model="m", judge_key_variable="JUDGE_KEY"))


@pytest.mark.parametrize(
    "trouble", [fails(500), fails(503, Retry_After="0"), fails(429), fails(408), breaks_off], ids=lambda f: f.__name__
)
def test_what_nobody_served_is_asked_again(ask, judge, trouble):
    assert ask(answers=[trouble, trouble, says("MARK verdict: 5")]) == [0.5]
    assert len(judge.requests) == 3


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (fails(400, b'{"error": "no such model"}'), "answered 400.*no such model"),
        (fails(401, b"who are you"), "answered 401: who are you"),
        (fails(307, b"", Location="http://elsewhere/"), "answered 307"),
        (fails(200, b"<html>"), "no chat completion"),
        (fails(200, b""), "no chat completion"),
        (fails(200, {"choices": []}), "no chat completion"),
        (fails(200, {"error": "busy"}), "no chat completion"),
        (fails(200, b'{"choices": [{"message": {"content": "\xff"}}]}'), "no chat completion"),
        (fails(200, {"choices": [{"message": {"content": None}}]}), "without text"),
        (says("MARK verdict: 5", finish_reason="length"), "cut its answer off"),
        (fails(200, b"x" * (5 << 20)), "more than"),
    ],
)
def test_what_asking_again_cannot_mend_is_an_error_at_once(ask, judge, answer, told):
    with pytest.raises(ServiceError, match=told):
        ask(answers=[answer])
    assert len(judge.requests) == 1


def test_a_judge_that_never_answers_ends_at_the_deadline(ask):
    with pytest.raises(ServiceError, match=r"did not answer within 0.3 s"):
        ask(answers=[never_answers], judge_timeout=0.3)


def test_a_judge_that_keeps_failing_ends_at_the_deadline_with_its_last_word(ask):
    with pytest.raises(ServiceError, match=r"within 0.6 s; \d attempts failed, the last one: answered 500: broken"):
        ask(answers=[fails(500, b"broken")], judge_timeout=0.6)


def test_a_judge_that_is_not_there_is_an_error(judge):
    args = hook_args(LlmJudge, judge_url="http://127.0.0.1:9/v1", judge_model="m", judge_timeout=0.5)

    async def score():
        hook = LlmJudge(args)
        try:
            await hook(args, make_sample())
        finally:
            await hook.aclose()

    with pytest.raises(ServiceError, match="ClientConnectorError"):
        asyncio.run(score())


def test_no_more_questions_are_under_way_than_allowed(ask, judge):
    ask(*[make_sample() for _ in range(12)], judge_concurrency=3)
    assert len(judge.requests) == 12
    assert judge.most_at_once <= 3
