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
    session = engine._updates
    ask(engine, "/begin_weight_update")
    session._session.tensors.update(weights)
    del weights
    assert ask(engine, "/end_weight_update")[0] == 200
    assert any(one() is not None for one in alive)
    ask(engine, "/release_memory_occupation")
    gc.collect()
    assert not any(one() is not None for one in alive)


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
