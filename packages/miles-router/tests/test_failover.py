"""Which engine gets a request, and what happens when one is gone."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from miles_router.errors import LostError
from miles_router.workers import WorkerRegistry


def test_the_engine_with_the_fewest_requests_under_way_is_chosen(serve, routed, engine):
    async def main():
        busy, idle = engine(), engine()
        busy.gate = asyncio.Event()
        async with serve(busy) as a, serve(idle) as b, routed(a) as r:
            held = [asyncio.create_task(r.post()) for _ in range(2)]
            await r.until(lambda row: row["outstanding"] == 2)
            r.app.registry.add(b)
            for _ in range(6):
                await r.post()
            busy.gate.set()
            await asyncio.gather(*held)
        assert (len(busy.requests), len(idle.requests)) == (2, 6)

    asyncio.run(main())


@pytest.mark.parametrize("policy", ["least_outstanding", "round_robin"])
def test_engines_that_are_equally_loaded_take_turns(serve, routed, engine, policy):
    async def main():
        engines = [engine(), engine(), engine()]
        async with contextlib.AsyncExitStack() as stack:
            urls = [await stack.enter_async_context(serve(e)) for e in engines]
            r = await stack.enter_async_context(routed(*urls, router_policy=policy))
            for _ in range(6):
                await r.post()
        assert [len(e.requests) for e in engines] == [2, 2, 2]

    asyncio.run(main())


def test_round_robin_ignores_load(serve, routed, engine):
    async def main():
        busy, idle = engine(), engine()
        busy.gate = asyncio.Event()
        async with serve(busy) as a, serve(idle) as b, routed(a, b, router_policy="round_robin") as r:
            held = [asyncio.create_task(r.post()) for _ in range(6)]
            while len(busy.requests) + len(idle.requests) < 6:
                await asyncio.sleep(0.01)
            assert (len(busy.requests), len(idle.requests)) == (3, 3)
            busy.gate.set()
            await asyncio.gather(*held)

    asyncio.run(main())


def test_an_engine_that_cannot_be_connected_is_skipped_and_comes_back_when_it_serves_again(
    serve, routed, engine, held_port
):
    async def main():
        target, other = engine(b"back"), engine(b"other")
        dead = f"http://127.0.0.1:{held_port}"
        async with serve(other) as alive, routed(dead, alive) as r:
            for _ in range(4):
                assert (await r.post()).text == "other"
            row = (await r.workers())[0]
            assert (row["url"], row["healthy"]) == (dead, False)
            assert "cannot be connected" in row["reason"]
            async with serve(target, held_port):
                await r.until(lambda row: row["healthy"])
                assert {(await r.post()).text for _ in range(2)} == {"back", "other"}

    asyncio.run(main())


def test_an_engine_comes_back_only_with_the_weights_it_should_have(serve, routed, engine, held_port):
    async def main():
        target = engine()
        target.weight_version = 4
        async with routed() as r:
            new = {"url": f"http://127.0.0.1:{held_port}", "weight_version": "5", "worker_type": "regular"}
            await r.client.post("/workers", json=new)
            assert (await r.post()).status_code == 503
            async with serve(target, held_port):
                await r.until(lambda row: "serves weights 4, not 5" in row["reason"])
                assert not (await r.workers())[0]["healthy"]
                target.weight_version = 5
                await r.until(lambda row: row["healthy"])
                assert (await r.post()).status_code == 200

    asyncio.run(main())


def test_registering_a_quarantined_engine_again_readmits_it_at_once(serve, routed, engine, held_port):
    async def main():
        async with routed(f"http://127.0.0.1:{held_port}", router_health_interval=3600) as r:
            await r.post()
            async with serve(engine(), held_port) as url:
                assert (await r.post()).status_code == 503
                await r.client.post("/workers", json={"url": url, "weight_version": "9"})
                assert (await r.post()).status_code == 200
                assert (await r.workers())[0]["weight_version"] == "9"

    asyncio.run(main())


def test_a_request_whose_only_engine_cannot_be_connected_gets_503_naming_it(routed, held_port):
    async def main():
        dead = f"http://127.0.0.1:{held_port}"
        async with routed(dead, router_health_interval=3600) as r:
            first, second = await r.post(), await r.post()
            health = await r.client.get("/health")
        assert first.status_code == second.status_code == 503
        assert first.json()["error"]["worker"] == dead
        assert first.json()["error"]["type"] == "worker_unreachable"
        assert dead in second.json()["error"]["message"]
        assert first.headers["retry-after"] == second.headers["retry-after"] == "1"
        assert (health.status_code, health.json()["status"]) == (503, "unhealthy")

    asyncio.run(main())


@pytest.mark.parametrize("limits", [{}, {"router_max_requests": 9}])
@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_an_address_that_is_no_hosts_name_gets_503_naming_it(routed, host, limits):
    async def main():
        async with routed(f"http://{host}:9", **limits) as r:
            answer = await r.post()
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "worker_unreachable")
            assert host in answer.json()["error"]["message"]
            assert (await r.workers())[0]["outstanding"] == 0

    asyncio.run(main())


def test_without_workers_a_request_gets_503_with_retry_after(routed):
    async def main():
        async with routed() as r:
            answer = await r.post()
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert answer.json()["error"] == {"message": "no worker is registered", "type": "no_worker", "code": 503}

    asyncio.run(main())


def test_an_idle_connection_that_the_engine_closed_costs_no_request(listen, routed):
    connections = 0

    async def one_answer_each(reader, writer):
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        await reader.read(1)  # the next request is read, never answered: the close races with it

    async def main():
        async with listen(one_answer_each) as url, routed(url) as r:
            for _ in range(3):
                assert (await r.client.get("/v1/models")).text == "ok"
            assert (await r.workers())[0]["healthy"]
        assert connections == 3

    asyncio.run(main())


def test_an_engine_that_hangs_up_before_answering_hands_its_request_to_one_other(listen, serve, routed, engine):
    async def main():
        deaths = 0

        async def dies(reader, writer):
            nonlocal deaths
            await reader.readuntil(b"\r\n\r\n")
            deaths += 1

        async with listen(dies) as a, listen(dies) as b, listen(dies) as c, serve(engine()) as good:
            async with routed(a, good) as r:
                assert [(await r.post()).status_code for _ in range(2)] == [200, 200]
            deaths = 0
            async with routed(a, b, c) as r:
                answer = await r.post()
        assert answer.status_code == 502
        assert answer.json()["error"]["worker"] in (a, b, c)
        assert deaths == 2  # a request that kills engines does not get to kill them all

    asyncio.run(main())


def test_an_engine_that_speaks_no_http_is_named(listen, routed):
    async def nonsense(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"220 smtp.example.org ready\r\n")
        await reader.read()

    async def main():
        async with listen(nonsense) as url, routed(url) as r:
            answer = await r.post()
        assert answer.status_code == 502
        assert url in answer.json()["error"]["message"]
        assert "not plain HTTP/1.1" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_an_engine_that_stays_silent_too_long_gets_its_client_a_504(serve, routed, engine):
    async def main():
        engines = [engine(), engine()]
        engines[0].gate = engines[1].gate = asyncio.Event()
        async with serve(engines[0]) as a, serve(engines[1]) as b, routed(a, b, router_request_timeout=0.2) as r:
            answer = await r.post()
            assert (answer.status_code, answer.json()["error"]["worker"]) == (504, a)
            assert all(row["healthy"] for row in await r.workers())  # slow is not dead
        assert engines[1].requests == []  # and what took too long once is not begun again

    asyncio.run(main())


def test_an_engine_that_keeps_sending_may_take_longer_than_the_timeout(listen, routed):
    async def slow(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\n")
        for _ in range(8):
            await asyncio.sleep(0.1)
            writer.write(b".")

    async def main():
        async with listen(slow) as url, routed(url, router_request_timeout=0.5) as r:
            assert (await r.post()).text == "." * 8

    asyncio.run(main())


def test_removing_an_engine_lets_its_requests_finish(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url) as r:
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            assert (await r.client.post("/remove_worker", params={"url": url})).status_code == 200
            assert (await r.post()).status_code == 503
            target.gate.set()
            assert (await held).status_code == 200
        assert len(target.requests) == 1

    asyncio.run(main())


def test_failures_count_in_a_row_and_an_answer_begins_a_new_count():
    doubted = []
    registry = WorkerRegistry(lambda worker: None, doubted.append)
    worker = registry.add("http://h:1")
    for _ in range(3):
        for _ in range(2):
            registry.failed(worker, LostError("closed the connection"))
        registry.answered(worker, 200)
    assert worker.healthy
    for _ in range(3):
        for _ in range(4):
            registry.answered(worker, 500)
        registry.answered(worker, 404)
    assert doubted == []
    for _ in range(10):
        registry.answered(worker, 500)
    assert doubted == [worker, worker]


def test_a_quarantine_closes_the_idle_connections(listen, routed):
    async def main():
        closed = asyncio.Event()

        async def keeps(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            assert await reader.read() == b""
            closed.set()

        async with listen(keeps) as url, routed(url, router_health_interval=3600) as r:
            assert (await r.client.get("/v1/models")).text == "ok"
            r.app.registry.quarantine(next(iter(r.app.registry)), "for a reason")
            await asyncio.wait_for(closed.wait(), 10)

    asyncio.run(main())


def test_an_engine_that_failed_a_request_does_not_get_it_again_whatever_the_policy_prefers(
    listen, serve, routed, engine
):
    async def main():
        deaths = 0

        async def dies(reader, writer):
            nonlocal deaths
            await reader.readuntil(b"\r\n\r\n")
            deaths += 1

        options = {"router_policy": "consistent_hashing", "router_health_interval": 3600}
        async with listen(dies) as a, serve(engine(b"served")) as b, routed(a, b, **options) as r:
            for key in range(20):
                before = deaths
                assert (await r.post(headers={"X-SMG-Routing-Key": str(key)})).text == "served"
                assert deaths <= before + 1
        assert deaths == 3  # then it is quarantined

    asyncio.run(main())
