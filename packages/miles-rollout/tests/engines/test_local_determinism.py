"""A deterministic engine: a request's tokens and log-probs are the same to the bit whatever else the engine does."""

from __future__ import annotations

import copy
import random
import struct

import httpx
import pytest
import torch

from miles_api.services import Placement
from miles_rollout.engines.local.errors import RequestError, UnsupportedModelError
from miles_rollout.engines.local.fleet import LocalFleet
from miles_rollout.engines.local.generate import JobFactory
from miles_rollout.engines.local.lean import LeanModel
from miles_rollout.engines.local.lean_fixed import slots
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.local.scheduler import Limits, Scheduler
from miles_rollout.engines.local.tokenizer import TextCodec
from miles_rollout.engines.protocol import GenerateRequest, SamplingParams

KINDS = ("qwen3", "llama", "llama3", "wide")


@pytest.fixture(scope="module")
def models(kit):
    """Deterministic models by kind and number: two of a kind are two engines with the same weights."""
    loaded = {}

    def model(kind, number=0):
        if (kind, number) not in loaded:
            with torch.inference_mode():
                loaded[kind, number] = load_model(kit.directory(kind), "auto", None, deterministic=True)
        return loaded[kind, number]

    return model


@pytest.fixture
def engine(kit, models):
    def make(kind="qwen3", number=0, **limits):
        return Scheduler(models(kind, number), TextCodec(kit.directory(kind)), Limits(**limits))

    return make


def answer(job):
    """What was drawn, with the log-probs as bits."""
    scores = [value for value in (*job.logprobs, *job.prompt_logprobs) if value is not None]
    return job.output_ids, struct.pack(f"{len(scores)}d", *scores), job.finish


@pytest.fixture
def alone(engine, drain):
    """The answer to a job that an engine of its own has nothing else to do than."""

    def run(kind, job):
        one = copy.deepcopy(job)
        drain(engine(kind), one)
        assert len(one.output_ids) == len(one.logprobs) > 0
        return answer(one)

    return run


def random_jobs(make_job, rng, vocabulary, longest, count):
    """Jobs that sample in every way there is; some share a prompt."""
    prompts = [[rng.randrange(3, vocabulary) for _ in range(rng.randint(1, longest // 2))] for _ in range(count // 2)]
    jobs = []
    for number in range(count):
        ids = rng.choice(prompts)
        fields = {
            "temperature": rng.choice([0.0, 0.7, 1.0, 1.0, 1.3]),
            "top_k": rng.choice([-1, -1, 1, 5, 20]),
            "top_p": rng.choice([1.0, 1.0, 0.8]),
            "min_p": rng.choice([0.0, 0.0, 0.1]),
            "stop_ids": rng.choice([(), (1,), (1, 7)]),
            "stop_strings": rng.choice([(), (), ("a", "5 "), (">>",)]),
            "prompt_logprob_start": rng.choice([-1, -1, 0]),
            "stream": rng.random() < 0.2,
        }
        limit = rng.randint(1, longest - len(ids))
        fields["min_new_tokens"] = rng.choice([0, 0, min(limit, 3)])
        jobs.append(make_job(ids, rid=str(number), seed=rng.randrange(1 << 40), max_new_tokens=limit, **fields))
    return jobs


def run_wildly(scheduler, jobs, rng):
    """Hand in the jobs in some order between steps, pausing, flushing and aborting some; return those aborted."""
    waiting, aborted = list(jobs), []
    rng.shuffle(waiting)
    while waiting or scheduler.busy:
        for _ in range(min(len(waiting), rng.choice([0, 0, 1, 2, 9]))):
            scheduler.add(waiting.pop())
        scheduler.step()
        dice = rng.random()
        if dice < 0.03:
            chosen = rng.choice(jobs).rid
            aborted += scheduler.abort(lambda job, chosen=chosen: job.rid == chosen)
        elif dice < 0.1:
            scheduler.pause("in_place")
            scheduler.resume()
        elif dice < 0.2:
            scheduler.flush()
    return aborted


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", KINDS)
def test_a_request_gets_the_same_bits_whatever_runs_beside_it(kind, seed, engine, alone, make_job):
    rng = random.Random(f"{kind}/{seed}")
    longest = 200 if kind == "wide" else 100
    jobs = random_jobs(make_job, rng, 1234 if kind == "wide" else 41, longest, 24)
    expected = [alone(kind, job) for job in jobs]
    # Few rows and a cache that forgets, then many of both.
    for number, limits in enumerate([{"max_running": 3, "cache_bytes": 20_000}, {"max_running": 40}]):
        together = copy.deepcopy(jobs)
        scheduler = engine(kind, number, **limits)
        aborted = run_wildly(scheduler, together, rng)
        for job, (ids, bits, finish) in zip(together, expected, strict=True):
            if job in aborted:
                assert job.output_ids == ids[: len(job.output_ids)]
            else:
                assert answer(job) == (ids, bits, finish)


def test_a_lone_request_and_one_in_a_full_batch_agree_at_every_place(engine, alone, make_job, drain, prompts):
    jobs = [make_job(prompts[i % 7], temperature=1.0, seed=i, max_new_tokens=5 + i % 9) for i in range(150)]
    expected = [alone("qwen3", job) for job in jobs]
    drain(engine("qwen3"), *jobs)
    assert [answer(job) for job in jobs] == expected


def test_a_long_request_gets_the_same_bits_beside_longer_ones(engine, alone, make_job, drain):
    """A product over 320 positions is rounded otherwise than one over 384 of which the last are 0."""
    short, long = ([7 + i % 50 for i in range(n)] for n in (250, 380))
    job = make_job(short, temperature=1.0, seed=1, max_new_tokens=60)
    expected = alone("wide", job)
    drain(engine("wide"), make_job(long, temperature=1.0, seed=2, max_new_tokens=90), job)
    assert answer(job) == expected


def test_functions_that_may_round_by_place_are_not_run_over_rows(kit, models, monkeypatch, make_job, drain, prompts):
    """Not on every machine do these show it."""

    def by_place(function):
        def run(*given):
            values = function(*given)
            return values + 1e-3 * torch.arange(len(values)).view(-1, *(1,) * (values.dim() - 1)) * len(values)

        return run

    heights = models("qwen3").heights
    for owner, name in ((torch, "hypot"), (torch, "polar"), (torch.Tensor, "log"), (torch.Tensor, "log_")):
        monkeypatch.setattr(owner, name, by_place(getattr(owner, name)))
    jobs = [make_job(ids, temperature=1.0, seed=i, max_new_tokens=90) for i, ids in enumerate(prompts)]
    together, used = copy.deepcopy(jobs), kit.scheduler("qwen3", deterministic=True)
    for job in jobs:
        drain(kit.scheduler("qwen3", deterministic=True), job)
    assert used.model.heights == heights
    drain(used, make_job([5] * 100))
    drain(used, *together)
    assert [answer(job) for job in together] == [answer(job) for job in jobs]


def test_the_normal_engine_does_not_make_this_promise(kit, make_job, drain, prompts):
    """Else the tests above would show nothing."""
    jobs = [make_job(ids, temperature=1.0, seed=i, max_new_tokens=20) for i, ids in enumerate(prompts)]
    together = copy.deepcopy(jobs)
    for job in jobs:
        drain(kit.scheduler(), job)
    drain(kit.scheduler(), *together)
    assert [answer(job) for job in jobs] != [answer(job) for job in together]


def test_a_prompt_from_the_cache_and_one_computed_anew_give_the_same_bits(engine, make_job, drain, prompts):
    scheduler = engine()
    first, cached, anew = (make_job(prompts[4], temperature=1.0, seed=3, max_new_tokens=30) for _ in range(3))
    drain(scheduler, first, *(make_job(ids, rid="other") for ids in prompts))
    drain(scheduler, cached)
    assert scheduler.flush()
    drain(scheduler, anew)
    assert cached.cached_tokens > anew.cached_tokens == 0
    assert answer(first) == answer(cached) == answer(anew)


def test_equally_likely_tokens_are_ranked_alike_beside_any_top_k(engine, alone, make_job, drain, prompts):
    model = engine().model
    head = model.tensors()["head"]
    kept = head.clone()
    try:
        # All of the vocabulary ties.
        head[:] = head[0]
        job = make_job(prompts[0], temperature=1.0, seed=1, top_k=4, max_new_tokens=20)
        expected = alone("qwen3", job)
        neighbours = [make_job(prompts[1], temperature=1.0, seed=2, top_k=k, max_new_tokens=20) for k in (-1, 2, 30)]
        drain(engine(), *neighbours, job)
    finally:
        head.copy_(kept)
    assert answer(job) == expected


def test_updated_weights_answer_as_those_the_engine_started_with(kit, engine, make_job, drain, prompts):
    job, after = (make_job(prompts[2], temperature=1.0, seed=4, max_new_tokens=30) for _ in range(2))
    drain(engine(), job)
    updated = kit.scheduler("qwen3", seed=1, deterministic=True)
    drain(updated, make_job(prompts[2]), *(make_job(ids) for ids in prompts))
    updated.swap_weights(updated.model.stage(kit.directory("qwen3")), "1")
    drain(updated, after)
    assert answer(after) == answer(job)


def test_it_answers_as_the_normal_engine_up_to_rounding(kit, engine, make_job, drain, prompts):
    for kind in KINDS:
        jobs = [make_job(ids, max_new_tokens=70 - len(ids)) for ids in prompts]
        normal = copy.deepcopy(jobs)
        drain(engine(kind), *jobs)
        drain(kit.scheduler(kind), *normal)
        for job, other in zip(jobs, normal, strict=True):
            assert job.output_ids == other.output_ids
            torch.testing.assert_close(job.logprobs, other.logprobs, atol=1e-4, rtol=1e-4)


def test_heights_that_round_differently_are_not_used(kit, monkeypatch):
    real = LeanModel._logits

    def otherwise(model, x):
        logits = real(model, x)
        return logits + 1e-3 if len(x) in (16, 64) else logits

    monkeypatch.setattr(LeanModel, "_logits", otherwise)
    assert load_model(kit.directory("qwen3"), "auto", None, deterministic=True).heights == (8, 32, 128, 256)


def test_on_a_machine_where_places_round_differently_rows_run_one_by_one(kit, monkeypatch, make_job, drain, prompts):
    real = LeanModel._logits
    monkeypatch.setattr(LeanModel, "_logits", lambda model, x: real(model, x) + 1e-3 * torch.arange(len(x))[:, None])
    scheduler = kit.scheduler("qwen3", deterministic=True)
    assert scheduler.model.heights == (1,)
    jobs = [make_job(prompts[0], temperature=1.0, seed=5) for _ in range(3)]
    drain(scheduler, *jobs)
    assert answer(jobs[0]) == answer(jobs[1]) == answer(jobs[2])


@pytest.mark.parametrize("heights", [(1,), (8, 16, 32, 64, 128, 256), (16, 64)])
def test_slots_hold_all_rows_and_waste_less_than_the_lowest_or_a_third(heights):
    for rows in range(1, 600):
        held = sum(slots(rows, heights))
        assert rows <= held < rows + max(heights[0], rows / 3 + 1)


def test_an_engine_of_a_deterministic_run_says_so_and_answers_alike_alone_and_in_a_crowd(kit, prompts):
    fleet = LocalFleet(LocalEngineOptions(), str(kit.directory("qwen3")), seed=0, deterministic=True)
    try:
        fleet.start([Placement()])
        with httpx.Client(base_url=fleet.endpoints()[0].url, timeout=60) as client:
            assert client.get("/server_info").json()["deterministic"] is True
            params = [{"max_new_tokens": 40, "ignore_eos": True, "sampling_seed": i} for i in range(len(prompts))]
            ask = {"input_ids": prompts, "sampling_params": params, "return_logprob": True}
            crowd = client.post("/generate", json=ask).json()
            for ids, one, reply in zip(prompts, params, crowd, strict=True):
                ask = {"input_ids": ids, "sampling_params": one, "return_logprob": True}
                alone = client.post("/generate", json=ask).json()
                assert alone["meta_info"]["output_token_logprobs"] == reply["meta_info"]["output_token_logprobs"]
            assert client.post("/generate", json={"input_ids": [5]}).status_code == 400
    finally:
        fleet.stop()


def test_a_running_request_is_not_retracted(engine, make_job, prompts):
    scheduler = engine()
    scheduler.pause("retract")
    scheduler.resume()
    scheduler.add(make_job(prompts[0]))
    scheduler.step()
    with pytest.raises(RequestError, match="abort or in_place"):
        scheduler.pause("retract")
    assert not scheduler.paused


def test_a_request_that_samples_without_a_seed_is_refused(kit):
    factory = JobFactory(TextCodec(kit.directory("qwen3")), 41, 128, 0, deterministic=True)
    with pytest.raises(RequestError, match="sampling_seed"):
        factory.expand(GenerateRequest(input_ids=[5], sampling_params=SamplingParams()))
    factory.expand(GenerateRequest(input_ids=[5], sampling_params=SamplingParams(temperature=0.0)))
    factory.expand(GenerateRequest(input_ids=[5], sampling_params=SamplingParams(sampling_seed=1)))


def test_transformers_own_forward_is_refused(kit):
    with pytest.raises(UnsupportedModelError, match="--engine-impl lean or auto, not hf"):
        load_model(kit.directory("qwen3"), "hf", None, deterministic=True)
