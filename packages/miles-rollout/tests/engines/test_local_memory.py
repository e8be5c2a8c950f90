"""An engine gives its memory up and takes it again, as the trainer's turn comes and goes."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import pytest
import torch
from safetensors.torch import load_file

from miles_rollout.engines.local.control import Control
from miles_rollout.engines.local.engine import Engine
from miles_rollout.engines.local.errors import ReleasedError, RequestError
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.scheduler import Limits, Scheduler
from miles_rollout.engines.local.tokenizer import TextCodec


@pytest.fixture
def engine(kit):
    """A running model loop, its endpoints, and what it held of weights before."""
    directory = kit.directory("qwen3")
    with torch.inference_mode():
        model = load_model(directory, "lean", None)
        scheduler = Scheduler(model, TextCodec(directory), Limits(8, 1 << 24))
    engine = Engine(scheduler, lambda news: None)
    engine.start()
    yield Control(engine, {"model_path": str(directory), "max_total_len": 128})
    engine.stop()


def ask(control, path, body=b"{}"):
    return asyncio.run(control.routes()[path].handler(body))


def weights_of(control):
    return control.engine.scheduler.model.tensors().values()


def held(control):
    return sum(tensor.untyped_storage().nbytes() for tensor in weights_of(control))


def test_released_weights_take_no_memory_and_come_back_without_numbers(engine):
    before = held(engine)
    assert ask(engine, "/release_memory_occupation")[1]["released"] == ["kv_cache", "weights"]
    assert held(engine) == 0
    assert ask(engine, "/resume_memory_occupation", b'{"tags": ["weights"]}')[1]["released"] == ["kv_cache"]
    assert held(engine) == before
    assert all(tensor.isnan().all() for tensor in weights_of(engine))


def test_weights_that_are_pushed_after_they_came_back_are_whole(engine, kit):
    ask(engine, "/release_memory_occupation")
    ask(engine, "/resume_memory_occupation", b'{"tags": ["weights"]}')
    body = b'{"model_path": "%s", "weight_version": "7"}' % str(kit.directory("qwen3")).encode()
    assert ask(engine, "/update_weights_from_disk", body)[0] == 200
    ask(engine, "/resume_memory_occupation", b'{"tags": ["kv_cache"]}')
    assert ask(engine, "/weights_checker", b'{"action": "checksum"}')[1]["stale"] == []


def test_a_request_is_refused_until_everything_is_back(engine):
    engine.memory.require()
    ask(engine, "/release_memory_occupation", b'{"tags": ["kv_cache"]}')
    with pytest.raises(ReleasedError, match="kv_cache"):
        engine.memory.require()
    ask(engine, "/resume_memory_occupation")
    engine.memory.require()


def test_releasing_or_resuming_twice_is_no_error(engine):
    for _ in range(2):
        ask(engine, "/release_memory_occupation")
    assert held(engine) == 0
    for _ in range(2):
        assert ask(engine, "/resume_memory_occupation")[1]["released"] == []


def test_a_busy_engine_keeps_its_memory(engine, make_job):
    engine.engine.scheduler.pause("in_place")
    engine.engine.submit([make_job([5, 6])])
    with pytest.raises(RequestError, match="no request runs or waits"):
        ask(engine, "/release_memory_occupation")
    assert held(engine) > 0


def test_tags_that_mean_nothing_are_named(engine):
    with pytest.raises(RequestError, match="not activations"):
        ask(engine, "/release_memory_occupation", b'{"tags": ["activations"]}')


def test_the_hash_of_weights_that_were_released_is_refused(engine):
    ask(engine, "/release_memory_occupation")
    status, answer = ask(engine, "/weights_checker", b'{"action": "checksum"}')
    assert status == 400
    assert "released" in answer["message"]


def test_an_engine_that_released_holds_on_to_nothing_that_was_sent_to_it(engine, kit):
    weights = load_file(kit.directory("qwen3") / "model.safetensors")
    alive = [weakref.ref(tensor) for tensor in weights.values()]
    ask(engine, "/begin_weight_update")
    engine._updates.session.tensors.update(weights)
    del weights
    assert ask(engine, "/end_weight_update")[0] == 200
    assert any(one() is not None for one in alive)
    ask(engine, "/release_memory_occupation")
    gc.collect()
    assert not any(one() is not None for one in alive)


def test_an_engine_that_released_holds_on_to_nothing_that_a_killed_run_has_begun_to_send(engine):
    ask(engine, "/begin_weight_update")
    tensor = torch.zeros(3)
    engine._updates.session.tensors["model.norm.weight"] = tensor
    alive = weakref.ref(tensor)
    del tensor
    ask(engine, "/release_memory_occupation")
    gc.collect()
    assert alive() is None
    assert ask(engine, "/begin_weight_update")[0] == 200


def test_a_directory_that_a_killed_run_had_read_does_not_get_into_the_next_session(engine, kit, monkeypatch):
    model, reading, go_on = engine.engine.scheduler.model, threading.Event(), threading.Event()
    stage = model.stage

    def slowly(weights):
        reading.set()
        assert go_on.wait(20)
        return stage(weights)

    def post(path, body):
        return engine.routes()[path].handler(body)

    async def both():
        await post("/begin_weight_update", b"{}")
        body = b'{"model_path": "%s", "weight_version": "7"}' % str(kit.directory("qwen3", seed=1)).encode()
        monkeypatch.setattr(model, "stage", slowly)
        reads = [asyncio.create_task(post("/update_weights_from_disk", body)) for _ in range(2)]
        await asyncio.to_thread(reading.wait, 20)
        assert (await post("/begin_weight_update", b'{"anew": true}'))[0] == 200
        go_on.set()
        # The second one has read nothing yet, and does not.
        assert [status for status, _ in await asyncio.gather(*reads)] == [200, 400]
        return await post("/end_weight_update", b"{}")

    assert asyncio.run(both())[0] == 200
    assert engine.engine.scheduler.weight_version == "default"


def test_a_request_that_comes_in_while_memory_is_released_waits_until_it_is_back(engine, kit, make_job):
    body = b'{"model_path": "%s"}' % str(kit.directory("qwen3")).encode()
    ask(engine, "/release_memory_occupation")
    job, ended = make_job([5, 6]), threading.Event()
    engine.engine._on_news = lambda news: ended.set() if news.finished else None
    engine.engine.submit([job])
    # An answer of the loop: it has seen the job.
    engine.engine.call(lambda: None).result(20)
    assert not ended.is_set()
    engine.engine.scheduler.pause("in_place")
    ask(engine, "/resume_memory_occupation")
    assert ask(engine, "/update_weights_from_disk", body)[0] == 200
    ask(engine, "/continue_generation")
    assert ended.wait(20)
    assert job.error is None
