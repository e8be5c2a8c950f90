"""Limits, the queue in front of them, and who is turned away."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from miles_router import RouterOptions
from miles_router.errors import LostError
from miles_router.gate import make_gate
from miles_router.policies import LeastOutstanding
from miles_router.routing import Refusal, Route
from miles_router.workers import Worker, WorkerRegistry


async def _held(r, target, count, **kwargs):
    """Send `count` requests one after another and return them, once the router has each."""
    tasks = []
    for n in range(count):
        before = await _known(r)
        tasks.append(asyncio.create_task(r.post(content=str(n).encode(), **kwargs)))
        while await _known(r) == before:
            await asyncio.sleep(0.005)
    return tasks


async def _status(r):
    return (await r.client.get("/status")).json()


async def _known(r):
    status = await _status(r)
    return status["queued"] + sum(row["outstanding"] for row in status["workers"])


def test_a_worker_gets_no_more_than_its_limit_and_the_rest_is_served_in_order(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Semaphore(0)
        target.gate.wait = target.gate.acquire
        async with serve(target) as url, routed(url, router_max_worker_requests=2) as r:
            held = await _held(r, target, 6)
            status = await _status(r)
            assert (status["workers"][0]["outstanding"], status["queued"]) == (2, 4)
            most = 0
            for done in range(6):
                while len(target.requests) < min(2 + done, 6):
                    await asyncio.sleep(0.005)
                most = max(most, (await r.workers())[0]["outstanding"])
                target.gate.release()
            assert [(await task).status_code for task in held] == [200] * 6
            assert most == 2
        assert sorted(body for _, body in target.requests[:2]) == [b"0", b"1"]
        assert [body for _, body in target.requests[2:]] == [b"2", b"3", b"4", b"5"]

    asyncio.run(main())


def test_the_limit_of_all_workers_together_counts_all_of_them(serve, routed, engine):
    async def main():
        engines = [engine(), engine()]
        engines[0].gate = engines[1].gate = asyncio.Event()
        async with serve(engines[0]) as a, serve(engines[1]) as b, routed(a, b, router_max_requests=3) as r:
            held = await _held(r, None, 5)
            status = await _status(r)
            assert (sum(row["outstanding"] for row in status["workers"]), status["queued"]) == (3, 2)
            engines[0].gate.set()
            assert [(await task).status_code for task in held] == [200] * 5

    asyncio.run(main())


def test_when_the_queue_is_full_a_request_gets_503_with_retry_after(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_max_worker_requests=1, router_queue_size=1) as r:
            held = await _held(r, target, 2)
            answer = await r.post()
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "queue_full"
            assert "--router-queue-size" in answer.json()["error"]["message"]
            target.gate.set()
            assert [(await task).status_code for task in held] == [200, 200]
            assert (await r.post()).status_code == 200

    asyncio.run(main())


def test_a_queue_of_no_size_turns_away_whoever_finds_no_place(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_max_requests=1, router_queue_size=0) as r:
            held = await _held(r, target, 1)
            assert (await r.post()).json()["error"]["type"] == "queue_full"
            target.gate.set()
            assert (await held[0]).status_code == 200

    asyncio.run(main())


def test_a_request_that_waits_too_long_gets_503_and_gives_up_its_place(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        limits = {"router_max_worker_requests": 1, "router_queue_timeout": 0.1}
        async with serve(target) as url, routed(url, **limits) as r:
            held = await _held(r, target, 1)
            answer = await r.post()
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "queue_timeout")
            assert "--router-queue-timeout 0.1 s" in answer.json()["error"]["message"]
            assert (await _status(r))["queued"] == 0
            target.gate.set()
            await held[0]
        assert len(target.requests) == 1

    asyncio.run(main())


def test_a_client_that_leaves_the_queue_reaches_no_engine(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_max_worker_requests=1) as r:
            held = await _held(r, target, 1)
            _, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
            while (await _status(r))["queued"] != 1:
                await asyncio.sleep(0.005)
            writer.close()
            while (await _status(r))["queued"] != 0:
                await asyncio.sleep(0.005)
            target.gate.set()
            await held[0]
            assert (await r.post()).status_code == 200
            assert (await _status(r))["statuses"] == {"200": 2, "499": 1}
        assert len(target.requests) == 2

    asyncio.run(main())


def test_a_new_worker_takes_over_what_waits(serve, routed, engine):
    async def main():
        busy, idle = engine(), engine(b"idle")
        busy.gate = asyncio.Event()
        async with serve(busy) as a, serve(idle) as b, routed(a, router_max_worker_requests=1) as r:
            held = await _held(r, busy, 3)
            await r.client.post("/workers", json={"url": b})
            assert [(await task).text for task in held[1:]] == ["idle", "idle"]
            busy.gate.set()
            await held[0]

    asyncio.run(main())


def test_those_who_wait_are_told_at_once_when_no_worker_is_left(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_max_worker_requests=1) as r:
            held = await _held(r, target, 2)
            await r.client.post("/remove_worker", params={"url": url})
            answer = await held[1]
            assert (answer.status_code, answer.json()["error"]["message"]) == (503, "no worker is registered")
            target.gate.set()
            assert (await held[0]).status_code == 200

    asyncio.run(main())


def test_one_who_waits_for_a_certain_engine_holds_up_nobody_else(serve, routed, engine):
    async def main():
        old, new = engine(b"old"), engine(b"new")
        old.gate = asyncio.Event()
        async with serve(old) as a, serve(new) as b, routed(router_max_worker_requests=1) as r:
            await r.client.post("/workers", json={"url": a, "weight_version": "1"})
            held = await _held(r, old, 2, headers={"X-Miles-Weight-Version": "1"})
            await r.client.post("/workers", json={"url": b, "weight_version": "2"})
            assert (await asyncio.wait_for(r.post(), 5)).text == "new"
            old.gate.set()
            assert [(await task).text for task in held] == ["old", "old"]

    asyncio.run(main())


def _pinned(version):
    return {"X-Miles-Weight-Version": version}


async def _pin(r, **versions):
    for url, version in versions.items():
        await r.client.post("/workers", json={"url": url, "weight_version": version})


def test_a_place_that_one_is_refused_goes_to_the_next(serve, routed, engine):
    async def main():
        old, new = engine(b"old"), engine(b"new")
        old.gate = asyncio.Event()
        async with serve(old) as a, serve(new) as b, routed(router_max_requests=1) as r:
            await _pin(r, **{a: "7", b: "8"})
            held = await _held(r, old, 1, headers=_pinned("7"))
            held += await _held(r, new, 1, headers=_pinned("8"))
            held += await _held(r, None, 1)
            await r.client.post("/remove_worker", params={"url": b})
            old.gate.set()
            answers = await asyncio.wait_for(asyncio.gather(*held), 10)
            assert [answer.status_code for answer in answers] == [200, 503, 200]

    asyncio.run(main())


def test_an_engine_that_changes_its_weights_serves_those_who_wait_for_them(serve, routed, engine):
    async def main():
        busy, idle = engine(), engine(b"idle")
        busy.gate = asyncio.Event()
        async with serve(busy) as a, serve(idle) as b, routed(router_max_worker_requests=1) as r:
            await _pin(r, **{a: "8", b: "7"})
            held = await _held(r, busy, 2, headers=_pinned("8"))
            await _pin(r, **{b: "8"})
            assert (await asyncio.wait_for(held[1], 10)).text == "idle"
            busy.gate.set()
            await held[0]

    asyncio.run(main())


def test_a_full_queue_turns_nobody_away_for_whom_an_engine_is_free(serve, routed, engine):
    async def main():
        busy, idle = engine(), engine(b"idle")
        busy.gate = asyncio.Event()
        limits = {"router_max_worker_requests": 1, "router_queue_size": 1}
        async with serve(busy) as a, serve(idle) as b, routed(**limits) as r:
            await _pin(r, **{a: "7", b: "8"})
            held = await _held(r, busy, 2, headers=_pinned("7"))
            assert (await r.post()).text == "idle"
            busy.gate.set()
            assert [(await task).status_code for task in held] == [200, 200]

    asyncio.run(main())


def test_a_request_that_comes_back_from_a_dead_engine_waits_in_front():
    async def main():
        registry = WorkerRegistry(lambda worker: None, lambda worker: None)
        worker, dead = registry.add("http://h:1"), Worker(9, "http://h:9", "")
        gate = make_gate(RouterOptions(router_max_requests=1), registry, LeastOutstanding())
        served = []

        async def ask(name, failed=()):
            route = Route({"headers": []}, b"")
            route.failed.update(dict.fromkeys(failed, LostError("died")))
            await gate.enter(route, asyncio.Event().wait)
            served.append(name)
            worker.outstanding -= 1
            gate.leave()

        assert await gate.enter(Route({"headers": []}, b""), asyncio.Event().wait) is worker
        tasks = [asyncio.create_task(ask(name)) for name in ("second", "third")]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(ask("back", [dead])))
        while len(gate) < 3:
            await asyncio.sleep(0)
        worker.outstanding -= 1
        gate.leave()
        await asyncio.gather(*tasks)
        assert served == ["back", "second", "third"]

    asyncio.run(main())


def _small_gate(**options):
    registry = WorkerRegistry(lambda worker: None, lambda worker: None)
    worker = registry.add("http://h:1")
    return make_gate(RouterOptions(router_max_requests=1, **options), registry, LeastOutstanding()), worker


def _enter(gate, failed=()):
    route = Route({"headers": []}, b"")
    route.failed.update(dict.fromkeys(failed, LostError("died")))
    return asyncio.create_task(gate.enter(route, asyncio.Event().wait))


def test_a_request_that_comes_back_from_a_dead_engine_is_not_turned_away_by_a_full_queue():
    async def main():
        gate, worker = _small_gate(router_queue_size=1)
        assert await _enter(gate) is worker
        waiting = _enter(gate)
        await asyncio.sleep(0)
        with pytest.raises(Refusal):
            await _enter(gate)
        back = _enter(gate, [Worker(9, "http://h:9", "")])
        await asyncio.sleep(0)
        for task in (back, waiting):
            worker.outstanding -= 1
            gate.leave()
            assert await task is worker

    asyncio.run(main())


def test_who_is_cancelled_at_the_moment_of_his_turn_gives_the_place_to_the_next():
    async def main():
        gate, worker = _small_gate()
        assert await _enter(gate) is worker
        first, second = _enter(gate), _enter(gate)
        while len(gate) < 2:
            await asyncio.sleep(0)
        worker.outstanding -= 1
        gate.leave()
        first.cancel()
        assert await asyncio.wait_for(second, 5) is worker
        assert worker.outstanding == 1

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{}, {"router_max_requests": 1000, "router_max_worker_requests": 500}])
def test_hundreds_of_clients_at_once_are_all_served_and_nothing_stays_counted(serve, routed, engine, limits):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url, **limits) as r:

            async def one(n):
                reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
                writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                if n % 3:
                    return (await reader.read()).split(b" ", 2)[1]
                writer.close()
                with contextlib.suppress(ConnectionError):
                    await writer.wait_closed()
                return b"left"

            answers = await asyncio.gather(*(one(n) for n in range(300)))
            assert answers.count(b"200") == 200
            await r.until(lambda row: row["outstanding"] == 0)
            assert (await _status(r))["queued"] == 0
            assert r.app._gate is None or r.app._gate._active == 0

    asyncio.run(main())


def test_however_many_wait_a_free_place_costs_a_look_at_the_first_of_each_kind(monkeypatch):
    looks = 0
    candidates = Route.candidates

    def counted(route, registry):
        nonlocal looks
        looks += 1
        return candidates(route, registry)

    async def main():
        nonlocal looks
        registry = WorkerRegistry(lambda worker: None, lambda worker: None)
        for port, version in ((1, "7"), (2, "8")):
            registry.add(f"http://h:{port}", version)
        gate = make_gate(RouterOptions(router_max_worker_requests=1), registry, LeastOutstanding())

        def ask(version):
            return gate.enter(Route({"headers": [(b"x-miles-weight-version", version)]}, b""), asyncio.Event().wait)

        await ask(b"7")
        waiting = [asyncio.create_task(ask(b"7")) for _ in range(500)]
        while len(gate) < 500:
            await asyncio.sleep(0)
        other = await ask(b"8")
        monkeypatch.setattr(Route, "candidates", counted)
        other.outstanding -= 1
        gate.leave()
        assert looks < 5
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert len(gate) == 0

    asyncio.run(main())


def test_who_finds_the_queue_full_is_told_to_come_when_those_in_it_will_have_been_served(monkeypatch):
    clock = 1000.0
    monkeypatch.setattr("miles_router.gate.time.monotonic", lambda: clock)

    async def main():
        nonlocal clock
        registry = WorkerRegistry(lambda worker: None, lambda worker: None)
        worker = registry.add("http://h:1")
        gate = make_gate(RouterOptions(router_max_requests=1, router_queue_size=10), registry, LeastOutstanding())

        async def ask():
            await gate.enter(Route({"headers": []}, b""), asyncio.Event().wait)

        await ask()
        waiting = [asyncio.create_task(ask()) for _ in range(10)]
        while len(gate) < 10:
            await asyncio.sleep(0)

        def advice():
            with pytest.raises(Refusal) as refused:
                gate.check()
            return refused.value.retry_after

        said = [advice()]
        for _ in range(4):  # one is served every two seconds, and somebody comes in its place
            clock += 2
            worker.outstanding -= 1
            gate.leave()
            waiting.append(asyncio.create_task(ask()))
            while len(gate) < 10:
                await asyncio.sleep(0)
            said.append(advice())
        clock += 10_000
        said.append(advice())
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        return said

    assert asyncio.run(main()) == [1, 20, 20, 20, 20, 60]


@pytest.mark.parametrize("limits", [{}, {"router_max_requests": 1000}], ids=["the short way", "with a queue"])
def test_the_bodies_of_all_requests_together_have_a_limit_and_each_gives_back_what_it_took(
    serve, routed, engine, limits
):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_max_body_memory=1000, **limits) as r:
            held = asyncio.create_task(r.post(content=bytes(600)))
            await r.until(lambda row: row["outstanding"] == 1)
            answer = await r.post(content=bytes(600))
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
            assert answer.json()["error"]["type"] == "body_memory_full"
            assert "--router-max-body-memory" in answer.json()["error"]["message"]
            small = asyncio.create_task(r.post(content=bytes(400)))
            await r.until(lambda row: row["outstanding"] == 2)
            target.gate.set()
            assert [(await task).status_code for task in (held, small)] == [200, 200]
            assert (await r.post(content=bytes(1000))).status_code == 200
            assert (await r.post(content=bytes(1001))).status_code == 413
            assert r.app.bodies.held == 0

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{}, {"router_max_requests": 1000}], ids=["the short way", "with a queue"])
def test_half_a_body_counts_until_its_client_leaves(serve, routed, engine, limits):
    async def main():
        async with serve(engine()) as url, routed(url, router_max_body_memory=1000, **limits) as r:
            _, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 900\r\n\r\n" + bytes(800))
            while r.app.bodies.held != 800:
                await asyncio.sleep(0.005)
            assert (await r.post(content=bytes(300))).status_code == 503
            writer.close()
            while r.app.bodies.held:
                await asyncio.sleep(0.005)
            assert (await r.post(content=bytes(300))).status_code == 200

    asyncio.run(main())
