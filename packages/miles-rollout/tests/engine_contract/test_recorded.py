"""SGLang's own answers, recorded: our client reads them, and the local engine answers the same requests alike."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from miles_api import Sample
from miles_api.errors import ServiceError
from miles_rollout.engines.protocol import (
    AbortRequest,
    Acknowledged,
    BeginUpdateRequest,
    ErrorReply,
    GenerateRequest,
    ModelInfo,
    PauseRequest,
    TokenizeRequest,
    UpdateFromDiskRequest,
    UpdateFromTensorRequest,
    UpdateVersionRequest,
)
from miles_rollout.generate.turn import ask, parse_reply

EXCHANGES = json.loads((Path(__file__).parent / "sglang_exchanges.json").read_text())
REQUESTS = {
    "/generate": GenerateRequest,
    "/tokenize": TokenizeRequest,
    "/abort_request": AbortRequest,
    "/pause_generation": PauseRequest,
    "/update_weights_from_disk": UpdateFromDiskRequest,
    "/update_weights_from_tensor": UpdateFromTensorRequest,
    "/update_weight_version": UpdateVersionRequest,
    "/begin_weight_update": BeginUpdateRequest,
}
ANSWERS = {
    "/update_weights_from_disk": Acknowledged,
    "/update_weights_from_tensor": Acknowledged,
    "/update_weight_version": Acknowledged,
    "/begin_weight_update": Acknowledged,
    "/end_weight_update": Acknowledged,
    "/model_info": ModelInfo,
}
OK = 200
UNORDERED = frozenset({"/abort_request", "/pause_generation", "/continue_generation", "/flush_cache"})
"""What was said while something else ran; sent again by itself it means something else."""
IN_WORDS = frozenset({"/flush_cache", "/health", "/abort_request", "/nowhere"})
"""SGLang answers these in words or with nothing, we with JSON; nobody reads more of it than the status."""

DIFFERENT = frozenset({"cached_tokens"})
"""SGLang shares any common prefix of two prompts, we only whole prompts."""


def asked(path, status=200):
    return [one for one in EXCHANGES if one["path"] == path and one["status"] == status]


def replies():
    return [
        (one["body"], reply)
        for one in asked("/generate")
        for reply in (one["answer"] if isinstance(one["answer"], list) else [one["answer"]])
    ]


def test_every_request_is_one_of_the_protocols_and_every_answer_is_read():
    for one in EXCHANGES:
        if one["status"] == 200 and (kind := REQUESTS.get(one["path"])):
            msgspec.convert(one["body"], kind)
        if kind := ANSWERS.get(one["path"]):
            msgspec.convert(one["answer"], kind)
    for one in asked("/generate", 400):
        assert msgspec.convert(one["answer"], ErrorReply).reason()
    for _, reply in replies():
        assert parse_reply(reply).output_ids == reply["output_ids"]
    assert {one["path"] for one in EXCHANGES} >= {*REQUESTS, *ANSWERS}


def test_the_rollout_reads_a_recorded_answer_into_a_sample():
    body, reply = next((body, reply) for body, reply in replies() if body.get("return_logprob"))
    sample = Sample(index=0, prompt="", tokens=list(body["input_ids"]))

    async def post(path, payload):
        return json.loads(json.dumps(reply))

    request = SimpleNamespace(
        sample=sample, args=SimpleNamespace(rollout_seed=0), sampling_params={}, evaluation=False,
        state=SimpleNamespace(post=post),
    )  # fmt: skip
    answer = asyncio.run(ask(request, sample.tokens, 12, 0))
    answer.append_to(sample)
    assert sample.tokens == body["input_ids"] + reply["output_ids"]
    assert sample.rollout_log_probs == [entry[0] for entry in reply["meta_info"]["output_token_logprobs"]]
    assert sample.status is Sample.Status.TRUNCATED
    assert sample.weight_versions == ["default"]


@pytest.mark.parametrize(
    ("field", "value"),
    [("finish_reason", "stop"), ("prompt_tokens", "5"), ("output_token_logprobs", [[None, 3, None]])],
)
def test_an_answer_with_something_else_than_is_relied_on_is_refused_by_name(field, value):
    _, reply = replies()[0]
    with pytest.raises(ServiceError, match=field):
        parse_reply({**reply, "meta_info": {**reply["meta_info"], field: value}})


def test_an_answer_of_an_older_release_is_read():
    _, reply = replies()[0]
    meta = {name: value for name, value in reply["meta_info"].items() if name != "weight_versions"}
    assert parse_reply({**reply, "meta_info": meta}).meta_info.weight_versions is msgspec.UNSET


def test_the_local_engine_answers_the_recorded_requests_alike(wire):
    if wire.kind != "local":
        pytest.skip("what was recorded was SGLang")
    wire.models.path(1)
    for one in EXCHANGES:
        if one["path"] in UNORDERED:
            continue
        text = json.dumps(one["body"]).replace("MODELS", str(wire.models.root))
        answer = wire.client.request(one["method"], one["path"], json=json.loads(text))
        assert answer.status_code == one["status"], (one, answer.text)
        if one["path"] == "/generate" and one["status"] != OK:
            assert msgspec.json.decode(answer.content, type=ErrorReply).reason()
        elif one["path"] not in IN_WORDS:
            compare(answer.json(), one["answer"], one)


def compare(ours, theirs, one):
    """Hold our answer against SGLang's: it has no field that theirs lacks, and the same kinds of values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        assert not ours.keys() - theirs.keys() - {"e2e_latency"}, one
        for name in ours.keys() & theirs.keys() - DIFFERENT:
            compare(ours[name], theirs[name], one)
    elif isinstance(ours, list) and isinstance(theirs, list) and is_greedy(one):
        assert len(ours) == len(theirs), one
        for our, their in zip(ours, theirs, strict=True):
            compare(our, their, one)
    elif isinstance(ours, float) and is_greedy(one):
        assert ours == pytest.approx(theirs, abs=1e-4), one
    else:
        assert kind(ours) == kind(theirs), (ours, theirs, one)
        if is_greedy(one) and isinstance(ours, int):
            assert ours == theirs, one


def is_greedy(one) -> bool:
    """Say whether the answer is determined by the request."""
    return one["status"] == 200 and (one["body"] or {}).get("sampling_params", {}).get("temperature") == 0


def kind(value) -> str:
    return "number" if isinstance(value, (int, float)) and not isinstance(value, bool) else type(value).__name__
