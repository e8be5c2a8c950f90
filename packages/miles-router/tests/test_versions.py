"""Requests that ask for certain weights, and a router that is told which weights are the right ones."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from miles_router import health
from miles_router.workers import WorkerRegistry


def test_a_request_for_certain_weights_goes_to_engines_registered_with_them_only(serve, routed, engine):
    async def main():
        old, new = engine(b"old"), engine(b"new")
        async with serve(old) as a, serve(new) as b, routed() as r:
            for url, version in ((a, "4"), (b, "5")):
                await r.client.post("/workers", json={"url": url, "weight_version": version})
            for version, text in (("4", "old"), ("5", "new")):
                answers = {(await r.post(headers={"X-Miles-Weight-Version": version})).text for _ in range(4)}
                assert answers == {text}
            assert {(await r.post()).text for _ in range(4)} == {"old", "new"}
            answer = await r.post(headers={"X-Miles-Weight-Version": "6"})
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "no_version")
            assert answer.json()["error"]["message"].endswith(f"registered with weights 6: {a} 4, {b} 5")
            await r.client.post("/workers", json={"url": a, "weight_version": "6"})
            assert (await r.post(headers={"X-Miles-Weight-Version": "6"})).text == "old"

    asyncio.run(main())


@contextlib.asynccontextmanager
async def _two(serve, routed, engine, versions):
    """Serve two engines behind a router, each with what it says of its weights and texts of its own."""
    engines = [engine(b"first"), engine(b"second")]
    for one, version in zip(engines, versions, strict=True):
        one.weight_version = version
    async with serve(engines[0]) as a, serve(engines[1]) as b, routed(a, b) as r:
        yield r, *engines


async def _require(r, version):
    answer = await r.client.post("/weight_version", json={"weight_version": version})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_engine_with_other_weights_gets_nothing_until_it_has_caught_up(serve, routed, engine):
    async def main():
        async with _two(serve, routed, engine, [7, 6]) as (r, _, late):
            said = await _require(r, "7")
            assert [row["reason"] for row in said["held_back"]] == ["serves weights 6, not 7"]
            assert {(await r.post()).text for _ in range(4)} == {"first"}
            assert (await r.client.get("/weight_version")).json() == {"weight_version": "7"}
            late.weight_version = 7
            while not (await r.workers())[1]["healthy"]:
                await asyncio.sleep(0.01)
            assert {(await r.post()).text for _ in range(4)} == {"first", "second"}
            assert [row["weight_version"] for row in await r.workers()] == ["7", "7"]
            assert (await r.post(headers={"X-Miles-Weight-Version": "7"})).status_code == 200

    asyncio.run(main())


def test_with_each_new_version_everybody_is_asked_again(serve, routed, engine):
    async def main():
        async with _two(serve, routed, engine, [7, 7]) as (r, first, _):
            assert (await _require(r, "7"))["held_back"] == []
            first.weight_version = 8
            assert [row["reason"] for row in (await _require(r, "8"))["held_back"]] == ["serves weights 7, not 8"]
            assert {(await r.post()).text for _ in range(4)} == {"first"}
            assert (await r.post(headers={"X-Miles-Weight-Version": "7"})).status_code == 503

    asyncio.run(main())


@pytest.mark.parametrize("version", ["", "6"])
def test_an_engine_that_registers_without_the_required_weights_has_to_show_them_first(serve, routed, engine, version):
    async def main():
        stale = engine(b"stale")
        stale.weight_version = 6
        async with serve(stale) as url, routed() as r:
            await _require(r, "7")
            await r.client.post("/workers", json={"url": url, "weight_version": version})
            assert not (await r.workers())[0]["healthy"]
            await r.until(lambda row: row["reason"] == "serves weights 6, not 7")
            await r.client.post("/workers", json={"url": url, "weight_version": version})
            assert (await r.post()).status_code == 503
            stale.weight_version = 7
            await r.until(lambda row: row["healthy"])
            assert (await r.workers())[0]["weight_version"] == "7"
        assert stale.requests == []

    asyncio.run(main())


def test_an_engine_that_registers_with_the_required_weights_serves_at_once(serve, routed, engine):
    async def main():
        async with serve(engine()) as url, routed(router_health_interval=3600) as r:
            await _require(r, "7")
            await r.client.post("/workers", json={"url": url, "weight_version": "7"})
            assert (await r.post()).status_code == 200

    asyncio.run(main())


def test_an_engine_that_restarts_with_stale_weights_is_held_back(serve, routed, engine, held_port):
    async def main():
        target = engine()
        target.weight_version = 7
        async with routed() as r:
            async with serve(target, held_port) as url:
                await r.client.post("/add_worker", params={"url": url})
                await _require(r, "7")
                assert (await r.post()).status_code == 200
            assert (await r.post()).status_code == 503
            target.weight_version = "default"
            async with serve(target, held_port):
                await r.until(lambda row: row["reason"] == "serves weights default, not 7")
                target.weight_version = 7
                await r.until(lambda row: row["healthy"])

    asyncio.run(main())


def test_an_engine_that_does_not_say_what_it_serves_is_held_back_and_the_others_serve(
    listen, serve, routed, engine, monkeypatch
):
    monkeypatch.setattr("miles_router.health._WEIGHTS_TIMEOUT_S", 0.05)

    async def mute(reader, _writer):
        await reader.read(-1)

    async def main():
        good = engine(b"good")
        good.weight_version = 7
        async with listen(mute) as a, serve(good) as b, routed(a, b) as r:
            said = await _require(r, "7")
            assert [row["url"] for row in said["held_back"]] == [a]
            assert "does not say within 0.05 s" in said["held_back"][0]["reason"]
            assert (await r.post()).text == "good"

    asyncio.run(main())


def test_a_requirement_that_is_lifted_lets_everybody_serve_again(serve, routed, engine):
    async def main():
        async with _two(serve, routed, engine, [7, 6]) as (r, _, _):
            await _require(r, "7")
            await _require(r, "")
            while not all(row["healthy"] for row in await r.workers()):
                await asyncio.sleep(0.01)
            assert {(await r.post()).text for _ in range(4)} == {"first", "second"}

    asyncio.run(main())


def test_those_who_wait_for_weights_that_nobody_serves_any_more_are_told_at_once(serve, routed, engine):
    async def main():
        target = engine()
        target.weight_version, target.gate = 7, asyncio.Event()
        async with serve(target) as url, routed(url, router_max_worker_requests=1) as r:
            await _require(r, "7")
            held = [asyncio.create_task(r.post(headers={"X-Miles-Weight-Version": "7"})) for _ in range(2)]
            while not (await r.client.get("/status")).json()["queued"]:
                await asyncio.sleep(0.01)
            target.weight_version = 8
            await _require(r, "8")
            done, _ = await asyncio.wait(held, return_when=asyncio.FIRST_COMPLETED)
            assert [task.result().json()["error"]["type"] for task in done] == ["no_version"]
            target.gate.set()
            await asyncio.gather(*held)

    asyncio.run(main())


def test_an_engine_that_says_it_has_other_weights_after_all_has_to_show_the_required_ones_again(serve, routed, engine):
    async def main():
        async with _two(serve, routed, engine, [7, 7]) as (r, first, _):
            await _require(r, "7")
            first.weight_version = 6
            url = (await r.workers())[0]["url"]
            await r.client.post("/workers", json={"url": url, "weight_version": "6"})
            assert {(await r.post()).text for _ in range(4)} == {"second"}
            first.weight_version = 7
            await r.until(lambda row: row["healthy"])

    asyncio.run(main())


def test_an_engine_that_shows_what_was_required_when_it_was_asked_is_asked_again_if_that_changed(monkeypatch):
    asked = []

    async def main():
        registry = WorkerRegistry(lambda worker: prober.watch(registry, worker), lambda worker: None)
        prober = health.HealthProber(0.01, 0)

        async def shows(worker, version=""):
            asked.append(version)
            registry.required = "8"  # meanwhile
            return ""

        monkeypatch.setattr(health, "probe", shows)
        registry.required = "7"
        worker = registry.add("http://h:1")
        while not worker.healthy:
            await asyncio.sleep(0.005)
        assert worker.weight_version == "8"

    asyncio.run(main())
    assert asked == ["7", "8"]
