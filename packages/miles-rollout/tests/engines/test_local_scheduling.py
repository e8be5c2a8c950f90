from __future__ import annotations

import torch

from miles_rollout.engines.local.kv import KVPool, Prefill, PromptCache
from miles_rollout.engines.protocol import VersionSpan


def test_jobs_that_join_and_leave_midway_get_the_tokens_they_get_alone(kit, make_job, drain, prompts):
    alone = []
    for i, ids in enumerate(prompts):
        job = make_job(ids, temperature=1.0, seed=i, max_new_tokens=4 + 5 * i)
        drain(kit.scheduler(), job)
        alone.append(job)
    scheduler = kit.scheduler(max_running=4)
    together = [make_job(ids, temperature=1.0, seed=i, max_new_tokens=4 + 5 * i) for i, ids in enumerate(prompts)]
    for job in together:
        scheduler.add(job)
        scheduler.step()
    drain(scheduler)
    assert [job.output_ids for job in together] == [job.output_ids for job in alone]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(torch.tensor(one.logprobs), torch.tensor(other.logprobs), atol=1e-5, rtol=1e-5)


def test_the_same_seed_draws_the_same_tokens_and_other_seeds_draw_others(kit, make_job, drain, prompts):
    jobs = [make_job(prompts[0], temperature=1.0, seed=seed, max_new_tokens=16) for seed in (1, 2, 1)]
    drain(kit.scheduler(), *jobs)
    assert jobs[0].output_ids == jobs[2].output_ids != jobs[1].output_ids


def test_a_group_is_prefilled_once_and_reports_what_was_copied(kit, make_job, drain, prompts, monkeypatch):
    scheduler = kit.scheduler()
    batches = []
    prefill = scheduler.model.prefill
    monkeypatch.setattr(scheduler.model, "prefill", lambda t, n: batches.append(len(n)) or prefill(t, n))
    jobs = [make_job(ids, temperature=1.0, seed=i) for ids in prompts[:2] for i in range(4)]
    drain(scheduler, *jobs)
    assert sum(batches) == 2
    assert [job.cached_tokens for job in jobs] == [0, 4, 4, 4, 0, 0, 0, 0]
    drain(scheduler, late := make_job(prompts[0]))
    assert sum(batches) == 2
    assert late.cached_tokens == 4


def test_a_flush_forgets_prompts_and_memory_but_not_while_jobs_are_there(kit, make_job, drain, prompts):
    scheduler = kit.scheduler()
    scheduler.add(make_job(prompts[0]))
    assert not scheduler.flush()
    drain(scheduler)
    assert scheduler.pool.rows > 0
    assert scheduler.flush()
    assert scheduler.pool.rows == 0
    drain(scheduler, again := make_job(prompts[0]))
    assert again.cached_tokens == 0


def test_an_abort_returns_what_was_drawn_and_leaves_the_others_alone(kit, make_job, drain, prompts):
    scheduler = kit.scheduler(max_running=2)
    running, kept, waiting = (make_job(ids, rid=str(i), max_new_tokens=20) for i, ids in enumerate(prompts[:3]))
    for job in (running, kept, waiting):
        scheduler.add(job)
    for _ in range(3):
        scheduler.step()
    gone = scheduler.abort(lambda job: job.rid in ("0", "2"))
    assert set(map(id, gone)) == {id(running), id(waiting)}
    assert len(running.output_ids) == len(running.logprobs) == 4
    assert waiting.output_ids == []
    assert running.finish.type == waiting.finish.type == "abort"
    drain(scheduler)
    drain(kit.scheduler(), reference := make_job(prompts[1], max_new_tokens=20))
    assert kept.output_ids == reference.output_ids


def test_a_pause_in_place_or_by_retraction_changes_no_token(kit, make_job, drain, prompts):
    drain(kit.scheduler(), reference := make_job(prompts[3], temperature=1.0, seed=5, max_new_tokens=20))
    for mode in ("in_place", "retract"):
        scheduler = kit.scheduler()
        scheduler.add(job := make_job(prompts[3], temperature=1.0, seed=5, max_new_tokens=20))
        for _ in range(4):
            scheduler.step()
        assert scheduler.pause(mode) == []
        assert not scheduler.step()
        assert (len(scheduler.waiting), len(scheduler.batch)) == ((0, 1) if mode == "in_place" else (1, 0))
        scheduler.resume()
        drain(scheduler)
        assert job.output_ids == reference.output_ids
        assert len(job.logprobs) == 20
        assert job.version_spans(20) == [VersionSpan(version="default", start=0, end=20)]


def test_a_pause_that_aborts_ends_everything(kit, make_job, prompts):
    scheduler = kit.scheduler()
    for ids in prompts[:3]:
        scheduler.add(make_job(ids))
    scheduler.step()
    assert {job.finish.type for job in scheduler.pause("abort")} == {"abort"}
    assert not scheduler.busy


def test_memory_bounds_how_many_jobs_run_together_but_never_the_last_one(kit, make_job, drain, prompts):
    scheduler = kit.scheduler(kv_bytes=1)
    jobs = [make_job(ids) for ids in prompts[:3]]
    for job in jobs:
        scheduler.add(job)
    scheduler.step()
    assert len(scheduler.batch) == 1
    drain(scheduler)
    assert all(len(job.output_ids) == 8 for job in jobs)


def test_the_longest_job_reaches_the_models_last_position(kit, make_job, drain):
    drain(kit.scheduler(), job := make_job([5] * 100, max_new_tokens=28))
    assert len(job.output_ids) == 28


def test_broken_weights_fail_the_request_and_not_the_engine(kit, make_job, drain, prompts):
    scheduler = kit.scheduler()
    scheduler.model.tensors()["norm"].fill_(float("nan"))
    drain(scheduler, job := make_job(prompts[0]))
    assert isinstance(job.error, FloatingPointError)
    assert not scheduler.busy


def test_a_pool_that_grows_keeps_its_rows():
    pool = KVPool([(2, 4, 4)], max_rows=64, max_length=256)
    keys = [torch.randn(3, 2, 10, 4)]
    pool.ensure(3, 11, 0)
    pool.put(0, Prefill(keys, keys, torch.zeros(3, 5)), torch.tensor([2, 0, 1]))
    pool.ensure(40, 200, 3)
    assert torch.equal(pool.keys[0][:3, :, :10], keys[0][[2, 0, 1]])
    assert (pool.rows, pool.length) == (40, 256)


def test_the_prompt_cache_drops_its_oldest_prompts_first():
    one = Prefill([torch.zeros(1, 1, 4, 1)], [torch.zeros(1, 1, 4, 1)], torch.zeros(1, 2))
    cache = PromptCache(max_bytes=2 * one.nbytes)
    for key in (b"a", b"b", b"c"):
        cache.add([key], Prefill(list(one.keys), list(one.values), one.logits))
    assert cache.get(b"a") is None
    assert cache.get(b"b") is not None
    assert cache.get(b"c") is not None
