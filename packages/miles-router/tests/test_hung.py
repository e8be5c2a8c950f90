"""Engines that take requests and do not serve them: who is asked, who is quarantined, and what becomes of requests."""

from __future__ import annotations

import asyncio
import contextlib

import pytest


async def _swallow(reader, writer):
    """Accept, read, never answer: a process whose event loop or scheduler hangs."""
    await reader.read(-1)


def test_an_engine_that_never_answers_is_quarantined_and_its_requests_go_to_another(listen, serve, routed, engine):
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            hung = await stack.enter_async_context(listen(_swallow))
            good = await stack.enter_async_context(serve(engine(b"served")))
            async with routed(hung, good, router_hang_timeout=0.2) as r:
                answers = await asyncio.gather(*(r.post() for _ in range(4)))
                assert [answer.text for answer in answers] == ["served"] * 4
                row = (await r.workers())[0]
                assert (row["url"], row["healthy"], row["outstanding"]) == (hung, False, 0)
                assert [(await r.post()).text for _ in range(3)] == ["served"] * 3

    asyncio.run(main())


def test_a_request_whose_only_engine_hangs_gets_504_naming_it(listen, routed):
    async def main():
        async with listen(_swallow) as hung, routed(hung, router_hang_timeout=0.1) as r:
            answer = await r.post()
        assert (answer.status_code, answer.json()["error"]["worker"]) == (504, hung)
        assert answer.json()["error"]["type"] == "worker_hung"
        assert "does not answer /server_info within 0.1 s" in answer.json()["error"]["message"]

    asyncio.run(main())


def test_a_request_that_hangs_engines_does_not_get_to_hang_them_all(listen, routed):
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            a, b, c = [await stack.enter_async_context(listen(_swallow)) for _ in range(3)]
            async with routed(a, b, c, router_hang_timeout=0.1, router_health_interval=0.1) as r:
                assert (await r.post()).status_code == 504
                assert sorted(row["sent"] for row in await r.workers()) == [0, 1, 1]

    asyncio.run(main())


def test_an_answer_that_stops_in_the_middle_is_cut_off_when_its_engine_hangs(listen, routed):
    connections = 0

    async def half(reader, writer):
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await reader.read(-1)

    async def main():
        async with listen(half) as url, routed(url, router_hang_timeout=0.1) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
            assert (await reader.read(-1)).endswith(b"half")
            writer.close()
            await r.until(lambda row: not row["healthy"])

    asyncio.run(main())


def test_a_busy_engine_that_answers_questions_is_left_alone_however_silent(serve, routed, engine):
    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url, router_hang_timeout=0.05, router_health_interval=0.02) as r:
            held = asyncio.create_task(r.post())
            while target.questions < 3:
                await asyncio.sleep(0.01)
            assert (await r.workers())[0]["healthy"]
            target.gate.set()
            assert (await held).status_code == 200
        assert len(target.requests) == 1

    asyncio.run(main())


def test_an_idle_engine_is_not_asked(serve, routed, engine):
    async def main():
        target, busy = engine(), engine()
        busy.gate = asyncio.Event()
        async with serve(target) as a, serve(busy) as b, routed(b, a, router_hang_timeout=5) as r:
            held = asyncio.create_task(r.post())
            while busy.questions < 3:
                await asyncio.sleep(0.01)
            busy.gate.set()
            await held
        assert target.questions == 0

    asyncio.run(main())


def test_three_requests_in_a_row_that_time_out_are_too_many(listen, routed):
    async def reacts(reader, writer):  # to everything but a request
        head = await reader.readuntil(b"\r\n\r\n")
        if head.startswith(b"GET"):
            writer.write(b"HTTP/1.1 503 Busy\r\ncontent-length: 0\r\n\r\n")
        await reader.read(-1)

    async def main():
        async with listen(reacts) as url, routed(url, router_request_timeout=0.1) as r:
            statuses = [(await r.post()).status_code for _ in range(4)]
            row = (await r.workers())[0]
        assert statuses == [504, 504, 504, 503]
        assert (row["healthy"], row["failed"], row["quarantines"]) == (False, 3, 1)

    asyncio.run(main())


@pytest.mark.parametrize(("health", "stays"), [(200, True), (503, False)])
def test_an_engine_that_only_sends_5xx_is_asked_whether_it_is_well(serve, routed, engine, health, stays):
    async def main():
        target = engine(b"broken", status=500)
        target.health = health
        async with serve(target) as url, routed(url) as r:
            for _ in range(5):  # the answer passes through: it is the engine's word on this request
                answer = await r.post()
                assert (answer.status_code, answer.text) == (500, "broken")
            while not target.checks:
                await asyncio.sleep(0.01)
            if stays:
                assert (await r.post()).status_code == 500
            else:
                await r.until(lambda row: row["reason"] == "answers /health with 503")
            assert (await r.workers())[0]["healthy"] is stays
            target.health, target.status = 200, 200
            await r.until(lambda row: row["healthy"])
            assert (await r.post()).status_code == 200

    asyncio.run(main())


def test_an_engine_that_keeps_failing_is_probed_ever_later():
    from miles_router.health import HealthProber
    from miles_router.workers import WorkerRegistry

    class Waits(HealthProber):
        first = []

        async def _until_healthy(self, registry, worker):
            self.first.append(self.first_wait(worker))

    async def main():
        prober = Waits(10.0, 0)
        registry = WorkerRegistry(lambda worker: prober.watch(registry, worker), lambda worker: None)
        worker = registry.add("http://h:1")
        for _ in range(6):
            registry.quarantine(worker, "gone")
            await asyncio.sleep(0)
            registry.readmit(worker)
        registry.answered(worker, 200)
        registry.quarantine(worker, "gone")
        await asyncio.sleep(0)
        return prober.first

    assert asyncio.run(main()) == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 1.0]
