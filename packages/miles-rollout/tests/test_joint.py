"""Samples of one group share a request to the engines."""

import asyncio
import threading

import pytest

from miles_api.errors import ServiceError
from miles_rollout.joint import JointRequests


class Engine:
    """What `post` reaches; holds its answers back until `open` is set, if there is one."""

    def __init__(self, answer=None, gate=None):
        self.posted, self.ended = [], []
        self.answer, self.gate = answer, gate

    async def post(self, path, payload):
        self.posted.append((path, payload))
        try:
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.ended.append(payload)
        if self.answer is not None:
            return self.answer(payload)
        ids = payload["input_ids"]
        return [{"said": each} for each in ids] if isinstance(ids[0], list) else {"said": ids}


def payload(*ids, seed=0):
    return {"input_ids": list(ids), "sampling_params": {"sampling_seed": seed}, "return_logprob": True}


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_what_a_group_asks_in_one_moment_is_one_request_and_each_gets_its_own_answer():
    engine = Engine()

    async def run():
        joint = JointRequests(engine.post, lambda: True)
        asked = [("a", payload(1, seed=7)), ("b", payload(2)), ("a", payload(3, seed=8))]
        return await asyncio.gather(*(joint.generate(key, each) for key, each in asked))

    assert asyncio.run(run()) == [{"said": [1]}, {"said": [2]}, {"said": [3]}]
    params = [{"sampling_seed": 7}, {"sampling_seed": 8}]
    together = {"input_ids": [[1], [3]], "sampling_params": params, "return_logprob": True}
    assert engine.posted == [("/generate", together), ("/generate", payload(2))]


def test_where_samples_may_not_join_each_travels_alone():
    engine = Engine()

    async def run():
        joint = JointRequests(engine.post, lambda: False)
        return await asyncio.gather(*(joint.generate("a", payload(i)) for i in (1, 2)))

    assert asyncio.run(run()) == [{"said": [1]}, {"said": [2]}]
    assert engine.posted == [("/generate", payload(1)), ("/generate", payload(2))]


def test_an_error_reaches_every_sample_as_an_exception_of_its_own():
    def refuse(_):
        raise ServiceError("no such model")

    async def run():
        joint = JointRequests(Engine(refuse).post, lambda: True)
        return await asyncio.gather(*(joint.generate("a", payload(i)) for i in (1, 2)), return_exceptions=True)

    first, second = asyncio.run(run())
    assert str(first) == str(second) == "no such model"
    assert type(first) is type(second) is ServiceError
    assert first is not second


def test_an_error_that_cannot_be_copied_reaches_every_sample_too():
    class OddError(Exception):
        def __init__(self, code, reason):
            super().__init__(f"{code}: {reason}")

    def refuse(_):
        raise OddError(7, "no")

    async def run():
        joint = JointRequests(Engine(refuse).post, lambda: True)
        asked = asyncio.gather(*(joint.generate("a", payload(i)) for i in (1, 2)), return_exceptions=True)
        return await asyncio.wait_for(asked, 5)

    assert [str(error) for error in asyncio.run(run())] == ["7: no", "7: no"]


def test_a_group_is_spread_over_the_engines_as_evenly_as_its_samples_were_alone():
    engine = Engine()

    async def run():
        joint = JointRequests(engine.post, lambda: True, engines=2)
        return await asyncio.gather(*(joint.generate("a", payload(i, seed=i)) for i in range(5)))

    assert asyncio.run(run()) == [{"said": [i]} for i in range(5)]
    assert sorted(len(each["input_ids"]) for _, each in engine.posted) == [2, 3]
    for _, each in engine.posted:
        assert [params["sampling_seed"] for params in each["sampling_params"]] == [ids for (ids,) in each["input_ids"]]


@pytest.mark.parametrize("answer", [{"said": 1}, [{"said": 1}]])
def test_an_answer_of_another_length_is_refused(answer):
    async def run():
        joint = JointRequests(Engine(lambda _: answer).post, lambda: True)
        await asyncio.gather(*(joint.generate("a", payload(i)) for i in (1, 2)))

    with pytest.raises(ServiceError, match="/generate was given 2 prompts and did not answer with as many replies"):
        asyncio.run(run())


def test_a_request_ends_when_nobody_wants_its_answers_any_more_and_not_before():
    async def run():
        gate = asyncio.Event()
        engine = Engine(gate=gate)
        joint = JointRequests(engine.post, lambda: True)
        first, second = (asyncio.ensure_future(joint.generate("a", payload(i))) for i in (1, 2))
        third, fourth = (asyncio.ensure_future(joint.generate("b", payload(i))) for i in (3, 4))
        await settle()
        for task in (first, third, fourth):
            task.cancel()
        await settle()
        ended = [each["input_ids"] for each in engine.ended]
        gate.set()
        return ended, await second

    assert asyncio.run(run()) == ([[[3], [4]]], {"said": [2]})


def test_samples_of_a_group_that_starts_later_do_not_hold_up_a_request():
    async def run():
        gate = asyncio.Event()
        engine = Engine(gate=gate)
        joint = JointRequests(engine.post, lambda: True)
        first = asyncio.ensure_future(joint.generate("a", payload(1)))
        await settle()
        second = asyncio.ensure_future(joint.generate("a", payload(2)))
        await settle()
        gate.set()
        return [await first, await second], len(engine.posted)

    assert asyncio.run(run()) == ([{"said": [1]}, {"said": [2]}], 2)


def test_each_group_of_a_rollout_is_one_request(worker, fake_engine):
    engine = fake_engine()
    worker(engine, rm_type="f1").generate(0, "1")
    assert (engine.joint, len(engine.requests)) == (2, 6)


def test_each_engine_gets_its_share_of_each_group(worker, fake_engine):
    engine = fake_engine()
    worker(engine, rm_type="f1", rollout_num_engines=3).generate(0, "1")
    assert (engine.joint, len(engine.requests)) == (0, 6)


def test_samples_travel_alone_where_router_middleware_may_look_at_them(worker, fake_engine):
    engine = fake_engine()
    worker(engine, rm_type="f1", miles_router_middleware_paths=["some.middleware"]).generate(0, "1")
    assert (engine.joint, len(engine.requests)) == (0, 6)


def test_samples_travel_alone_while_others_wait_for_a_slot(worker, fake_engine, engine_reply):
    both_under_way = threading.Barrier(2)

    def answer(_):
        if len(engine.requests) <= both_under_way.parties:
            both_under_way.wait(10)
        return 200, engine_reply([5, 1], "3")

    engine = fake_engine(answer)
    worker(engine, rm_type="f1", sglang_server_concurrency=2).generate(0, "1")
    assert len(engine.requests) == 6
