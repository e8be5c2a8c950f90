from __future__ import annotations

import msgspec
import pytest

from miles_rollout.engines.local.errors import RequestError
from miles_rollout.engines.local.generate import JobFactory, decode_finished, make_reply
from miles_rollout.engines.local.tokenizer import TextCodec
from miles_rollout.engines.protocol import GenerateRequest


@pytest.fixture(scope="module")
def codec(kit):
    return TextCodec(kit.directory("qwen3"))


@pytest.fixture
def expand(codec):
    factory = JobFactory(codec, vocab_size=41, max_total_len=32, seed=0)

    def run(**body):
        return factory.expand(msgspec.json.decode(msgspec.json.encode(body), type=GenerateRequest))

    return run


@pytest.fixture
def generate(kit, codec, expand, drain):
    """Run one request without HTTP and return its replies as plain values."""

    def run(**body):
        jobs, _ = expand(**body)
        drain(kit.scheduler(), *jobs)
        decode_finished(codec, jobs)
        return [msgspec.to_builtins(make_reply(job, "default")) for job in jobs]

    return run


GREEDY = {"temperature": 0, "max_new_tokens": 12}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("regex", "a+"),
        ("json_schema", "{}"),
        ("frequency_penalty", 0.5),
        ("repetition_penalty", 1.1),
        ("logit_bias", {"3": 1.0}),
        ("top_p", 0.0),
        ("top_k", 0),
        ("temperature", -1.0),
        ("n", 0),
        ("max_new_tokens", 0),
    ],
)
def test_a_sampling_parameter_that_cannot_be_honoured_is_refused_by_name(expand, name, value):
    with pytest.raises(RequestError, match=name):
        expand(input_ids=[3], sampling_params={name: value})


def test_neutral_values_of_unsupported_parameters_are_fine(expand):
    neutral = {"regex": None, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "json_schema": None}
    assert expand(input_ids=[3], sampling_params=neutral, top_logprobs_num=0, lora_path=None)[0]


def test_an_unknown_parameter_is_refused_by_name(expand):
    with pytest.raises(msgspec.ValidationError, match="temprature"):
        expand(input_ids=[3], sampling_params={"temprature": 1.0})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"input_ids": [3] * 32}, "the prompt has 32 tokens; the engine's longest prompt plus response is 32"),
        ({"input_ids": [3] * 20, "sampling_params": {"max_new_tokens": 13}}, "make 33; .* 32"),
        ({"input_ids": [3, 41]}, "found 41"),
        ({"input_ids": [-1, 3]}, "found -1"),
        ({"input_ids": []}, "no tokens"),
        ({"input_ids": [3, [4]]}, "mixes"),
        ({"input_ids": [[3], 4]}, "mixes"),
        ({}, "exactly one of"),
        ({"input_ids": [3], "text": "a"}, "exactly one of"),
        ({"input_ids": [3], "return_routed_experts": True}, "return_routed_experts"),
        ({"input_ids": [3, 4], "return_logprob": True, "logprob_start_len": 2}, "logprob_start_len=2"),
        ({"input_ids": [[3], [4]], "sampling_params": [{}]}, "sampling_params has 1 entries for 2 prompts"),
    ],
)
def test_a_bad_request_says_what_is_wrong(expand, body, message):
    with pytest.raises(RequestError, match=message):
        expand(**body)


def test_without_a_limit_a_request_gets_what_the_context_still_holds(expand):
    assert expand(input_ids=[3] * 30)[0][0].max_new_tokens == 2


def test_text_and_token_ids_of_the_same_prompt_give_the_same_reply(generate, codec):
    by_text = generate(text="sort 31> ", sampling_params=GREEDY)[0]
    by_ids = generate(input_ids=codec.encode("sort 31> "), sampling_params=GREEDY)[0]
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == codec.decode(by_ids["output_ids"], True)


def test_a_stop_token_ends_the_reply_and_is_trimmed_from_the_text_alone(generate, codec):
    free = generate(text="abc", sampling_params=GREEDY)[0]["output_ids"]
    stop = free[4]
    first = free.index(stop) + 1
    reply = generate(text="abc", sampling_params=GREEDY | {"stop_token_ids": [stop]})[0]
    assert reply["output_ids"] == free[:first]
    assert reply["text"] == codec.decode(free[: first - 1], True)
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    assert reply["meta_info"]["completion_tokens"] == first
    kept = generate(text="abc", sampling_params=GREEDY | {"stop_token_ids": [stop], "no_stop_trim": True})[0]
    assert kept["text"] == codec.decode(free[:first], True)
    ignored = generate(text="abc", sampling_params=GREEDY | {"stop_token_ids": [stop], "ignore_eos": True})[0]
    assert ignored["output_ids"] == free


def test_a_stop_string_that_spans_tokens_ends_and_trims_the_reply(generate, codec):
    free = generate(text="sort 4", sampling_params=GREEDY | {"skip_special_tokens": False})[0]["output_ids"]
    stop = codec.decode(free[4:6], False)
    # The first place where the two characters stand side by side.
    count = next(n for n in range(1, 13) if stop in codec.decode(free[:n], False))
    text = codec.decode(free[:count], False)
    asked = GREEDY | {"skip_special_tokens": False, "stop": ["never", stop]}
    reply = generate(text="sort 4", sampling_params=asked)[0]
    assert reply["output_ids"] == free[:count]
    assert reply["text"] == text[: text.index(stop)]
    assert reply["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    kept = generate(text="sort 4", sampling_params=asked | {"no_stop_trim": True})[0]
    assert kept["text"] == text


def test_end_of_sequence_cannot_come_before_min_new_tokens(generate):
    sampling = {"temperature": 1.0, "max_new_tokens": 12, "stop_token_ids": list(range(3, 30)), "sampling_seed": 4}
    early = generate(input_ids=[5, 6], sampling_params=sampling)[0]["output_ids"]
    late = generate(input_ids=[5, 6], sampling_params=sampling | {"min_new_tokens": 6})[0]["output_ids"]
    assert len(early) < 6 < len(late)
    assert not set(late[:6]) & {1, *range(3, 30)}


def test_special_tokens_stay_in_the_text_when_asked_for(generate):
    # Token 1 is <eos>; ignoring it lets it appear inside the output.
    sampling = {"max_new_tokens": 29, "ignore_eos": True, "temperature": 100.0, "sampling_seed": 3}
    kept = generate(input_ids=[5, 6], sampling_params=sampling | {"skip_special_tokens": False})[0]
    dropped = generate(input_ids=[5, 6], sampling_params=sampling)[0]
    assert kept["output_ids"] == dropped["output_ids"]
    assert "<" in kept["text"]
    assert "<" not in dropped["text"]


def test_several_samples_and_prompts_come_back_in_order_with_their_own_seeds(expand):
    jobs, is_list = expand(input_ids=[[3, 4], [5]], sampling_params={"n": 2, "sampling_seed": 9}, rid="a")
    assert is_list
    assert [(job.rid, job.ids, job.seed) for job in jobs] == [
        ("a_0_0", [3, 4], 9),
        ("a_0_1", [3, 4], 10),
        ("a_1_0", [5], 9),
        ("a_1_1", [5], 10),
    ]


def test_requests_without_a_seed_get_different_ones_and_engines_with_one_seed_the_same(codec):
    streams = [JobFactory(codec, 41, 32, seed) for seed in (0, 0, 1)]
    request = GenerateRequest(input_ids=[3])
    seeds = [[factory.expand(request)[0][0].seed for _ in range(50)] for factory in streams]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0], *seeds[2]}) == 100


def test_a_text_stream_holds_back_what_may_become_a_stop_string(codec):
    stream = codec.stream(skip_special_tokens=True)
    shown = [stream.push(codec.encode(piece), ("stop",)) for piece in ("a", "s", "t", "x", "sto")]
    assert shown == ["a", "a", "a", "astx", "astx"]
