"""Engines that take requests and do not serve them: who is asked, who is quarantined, and what becomes of requests."""

from __future__ import annotations

import asyncio
import contextlib
import errno

import pytest

from miles_router.errors import LocalError
from miles_router.exchanges import Exchanges
from miles_router.fetch import fetch
from miles_router.workers import Worker


def _ok(body=b""):
    return b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)


class _HangsAtARequest:
    """Answers `/server_info` until it is asked to generate, and what `cheap` names for ever; nothing else."""

    def __init__(self, cheap=()):
        self.cheap = cheap
        self.posts = 0

    async def __call__(self, reader, writer):
        while True:
            try:
                path = (await reader.readuntil(b"\r\n\r\n")).split(b" ", 2)[1]
            except asyncio.IncompleteReadError:
                return
            self.posts += path == b"/generate"
            if path in self.cheap or (path == b"/server_info" and not self.posts):
                writer.write(_ok(b"{}"))


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


def test_a_request_that_hangs_engines_does_not_get_to_hang_them_all_and_gets_504_naming_one(listen, routed):
    async def main():
        async with contextlib.AsyncExitStack() as stack:
            handlers = [_HangsAtARequest() for _ in range(3)]
            urls = [await stack.enter_async_context(listen(handler)) for handler in handlers]
            async with routed(*urls, router_hang_timeout=0.1) as r:
                answer = await r.post()
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["worker"] in urls) == (504, "worker_hung", True)
        assert "does not answer /server_info within 0.1 s" in error["message"]
        assert sorted(handler.posts for handler in handlers) == [0, 1, 1]

    asyncio.run(main())


def test_while_no_engine_reacts_none_is_blamed_and_requests_wait(listen, serve, routed, engine, caplog, monkeypatch):
    monkeypatch.setattr("miles_router.health._PROBE_TIMEOUT_S", 0.1)

    async def main():
        async with contextlib.AsyncExitStack() as stack:
            a, b = [await stack.enter_async_context(listen(_swallow)) for _ in range(2)]
            async with routed(a, b, router_hang_timeout=0.05) as r:
                held = asyncio.create_task(r.post())
                while "no other reacts" not in caplog.text:
                    await asyncio.sleep(0.01)
                assert [row["healthy"] for row in await r.workers()] == [True, True]
                assert not held.done()
                r.app.registry.remove(b)
                r.app.registry.add(await stack.enter_async_context(serve(engine(b"served"))))
                assert (await held).text == "served"

    asyncio.run(main())


@pytest.mark.parametrize("gone", ["quarantined", "removed"])
def test_requests_of_a_hung_engine_go_elsewhere_though_it_is_quarantined_or_removed_already(
    listen, serve, routed, engine, gone
):
    async def main():
        async with (
            listen(_swallow) as hung,
            serve(engine(b"served")) as good,
            routed(hung, router_hang_timeout=0.1) as r,
        ):
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            worker = next(iter(r.app.registry))
            r.app.registry.add(good)
            if gone == "removed":
                r.app.registry.remove(hung)
            else:
                r.app.registry.quarantine(worker, "for a reason of its own")
            assert (await asyncio.wait_for(held, 10)).text == "served"

    asyncio.run(main())


def test_cheap_answers_do_not_hide_that_an_engine_hangs(listen, serve, routed, engine):
    async def main():
        hangs = _HangsAtARequest(cheap=(b"/model_info", b"/tokenize"))
        async with listen(hangs) as url, serve(engine(b"served")) as good, routed(router_hang_timeout=0.3) as r:
            r.app.registry.add(url, "7")
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            r.app.registry.add(good)
            to_it = {"X-Miles-Weight-Version": "7"}
            deadline = asyncio.get_running_loop().time() + 10
            while not held.done() and asyncio.get_running_loop().time() < deadline:
                await asyncio.gather(r.client.get("/model_info", headers=to_it), r.post("/tokenize", headers=to_it))
            assert held.done()
            assert held.result().text == "served"

    asyncio.run(main())


def test_an_engine_that_hung_is_readmitted_only_when_it_answers_what_showed_it(
    listen, serve, routed, engine, monkeypatch
):
    monkeypatch.setattr("miles_router.health._PROBE_TIMEOUT_S", 0.1)
    reacts = asyncio.Event()
    probes = 0

    async def half_well(reader, writer):
        nonlocal probes
        head = await reader.readuntil(b"\r\n\r\n")
        if b" /health " in head:
            probes += 1
            writer.write(_ok())
        elif b" /server_info " in head:
            await reacts.wait()
            writer.write(_ok(b"{}"))
        await reader.read(-1)

    async def main():
        async with listen(half_well) as hung, serve(engine()) as good, routed(hung, good, router_hang_timeout=0.1) as r:
            await asyncio.gather(r.post(), r.post())
            while probes < 2:
                await asyncio.sleep(0.01)
            assert not (await r.workers())[0]["healthy"]
            reacts.set()
            await r.until(lambda row: row["healthy"])

    asyncio.run(main())


def test_an_engine_that_stops_listening_may_end_what_it_works_on(serve, routed, engine):
    release = asyncio.Event()
    server = None

    async def draining(reader, writer):
        server.close()
        await reader.readuntil(b"\r\n\r\n")
        await release.wait()
        writer.write(_ok(b"ended well"))

    async def main():
        nonlocal server
        server = await asyncio.start_server(draining, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with serve(engine()) as good, routed(url, router_hang_timeout=0.1) as r:
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            r.app.registry.add(good)
            await r.until(lambda row: not row["healthy"])
            release.set()
            assert (await held).text == "ended well"

    asyncio.run(main())


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EADDRNOTAVAIL])
def test_an_engine_is_not_blamed_for_what_the_router_lacks(routed, monkeypatch, number):
    async def fails(*_, **__):
        raise OSError(number, "none left")

    async def main():
        async with routed("http://127.0.0.1:1") as r:
            (await r.workers())  # the client's connection is open from here on
            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "create_connection", fails)
                answer = await r.post()
            row = (await r.workers())[0]
        assert (answer.status_code, answer.json()["error"]["type"]) == (503, "router_exhausted")
        assert (row["healthy"], row["failed"], row["outstanding"]) == (True, 0, 0)

    asyncio.run(main())


def test_an_answer_that_stops_in_the_middle_is_cut_off_when_its_engine_hangs(listen, serve, routed, engine):
    connections = 0

    async def half(reader, writer):
        nonlocal connections
        connections += 1
        if connections == 1:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nhalf")
        await reader.read(-1)

    async def main():
        async with listen(half) as url, serve(engine()) as good, routed(url, router_hang_timeout=0.1) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
            await reader.readuntil(b"half")
            r.app.registry.add(good)
            assert await reader.read(-1) == b""
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


def test_an_engine_that_generates_while_it_is_asked_does_not_hang_though_it_never_says_so(
    listen, serve, routed, engine
):
    questions = 0
    asked, over = asyncio.Event(), asyncio.Event()

    async def absorbed(reader, writer):
        nonlocal questions
        if b" /server_info " in await reader.readuntil(b"\r\n\r\n"):
            questions += 1
            asked.set()
            await reader.read(-1)
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while not over.is_set():  # each question finds it at work on the next token
            await asked.wait()
            asked.clear()
            writer.write(b"1\r\nx\r\n")
        writer.write(b"0\r\n\r\n")

    async def main():
        async with listen(absorbed) as url, serve(engine()) as good, routed(url, router_hang_timeout=0.05) as r:
            held = asyncio.create_task(r.post())
            await r.until(lambda row: row["outstanding"] == 1)
            r.app.registry.add(good)
            while questions < 5:
                await asyncio.sleep(0.01)
            over.set()
            assert set((await asyncio.wait_for(held, 10)).text) == {"x"}
            assert (await r.workers())[0]["quarantines"] == 0

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


def test_a_worker_that_comes_back_and_is_not_well_is_asked_ever_more_seldom(monkeypatch):
    from miles_router import health
    from miles_router.workers import WorkerRegistry

    waits, sleep = [], asyncio.sleep

    async def slept(seconds):
        waits.append(seconds)
        await sleep(0)

    async def sick(worker, version=""):
        return "is sick" if len(waits) < 8 else ""

    async def main():
        monkeypatch.setattr(health, "probe", sick)
        monkeypatch.setattr(health.asyncio, "sleep", slept)
        prober = health.HealthProber(10.0, 0)
        registry = WorkerRegistry(lambda worker: prober.watch(registry, worker), lambda worker: None)
        worker = registry.add("http://h:1")
        registry.quarantine(worker, "gone")
        while not worker.healthy:
            await sleep(0)

    asyncio.run(main())
    assert waits == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0, 10.0, 10.0]


def test_a_router_that_cannot_ask_blames_no_engine_for_it(listen, serve, routed, engine, monkeypatch):
    asked = 0
    cannot_ask = ""

    async def short_of_files(worker, path, *headers):
        nonlocal asked
        if worker.url != cannot_ask:
            return await fetch(worker, path, *headers)
        asked += 1
        raise LocalError("the router cannot open a connection: Too many open files")

    monkeypatch.setattr("miles_router.health.fetch", short_of_files)

    async def main():
        nonlocal cannot_ask
        broken = engine(status=500)
        async with listen(_swallow) as silent, serve(broken) as url, routed(url, router_hang_timeout=0.05) as r:
            cannot_ask = url
            for _ in range(5):
                assert (await r.post()).status_code == 500
            await r.until(lambda row: asked)
            cannot_ask = silent
            r.app.registry.add(silent)
            held = [asyncio.create_task(r.post()) for _ in range(2)]
            while asked < 6:  # over more than the timeout
                await asyncio.sleep(0.01)
            assert [row["healthy"] for row in await r.workers()] == [True, True]
            for task in held:
                task.cancel()
            await asyncio.gather(*held, return_exceptions=True)

    asyncio.run(main())


class _Exchange:
    """A connection, to `Exchanges`: when it heard something last, and whether that was of an answer."""

    paused = complete = False
    status = 200

    def __init__(self, heard, speaks=True):
        self.last_activity, self.speaks = heard, speaks


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize(("generates", "status", "asked"), [(True, 200, False), (False, 200, True), (True, 404, True)])
def test_who_generated_for_somebody_lately_is_not_asked_whether_it_hangs(generates, status, asked, over):
    exchanges, worker = Exchanges(), Worker(1, "http://h:1", "")
    waits, served = _Exchange(1.0, speaks=False), _Exchange(9.0)
    served.status = status
    exchanges.begin(waits, worker, generates=True)
    exchanges.begin(served, worker, generates=generates)
    if over:
        exchanges.end(served)
    assert exchanges.silent(before=5.0) == ({worker} if asked else set())
    assert exchanges.silent(before=0.5) == set()


def test_an_engine_is_not_asked_because_its_client_reads_slowly():
    exchanges, worker = Exchanges(), Worker(1, "http://h:1", "")
    slow = _Exchange(1.0)
    slow.paused = True
    exchanges.begin(slow, worker, generates=True)
    assert exchanges.silent(before=5.0) == set()
