"""The middleware that ships: found by short name, passes the conformance suite, and costs nothing unless configured."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

from miles_api.loading.load import entry_points
from miles_api.testing import check_hook
from miles_router.middleware import resolve_middleware

NAMES = ("prefix_tokens", "rate_limit", "recorder", "response_cache", "tracing")


def need(name):
    if name == "tracing":
        pytest.importorskip("opentelemetry")


def test_all_have_short_names():
    assert set(NAMES) <= set(entry_points("miles.hooks.router_middleware"))


@pytest.mark.parametrize("name", NAMES)
def test_it_does_what_every_middleware_must(name, tmp_path, monkeypatch):
    need(name)
    monkeypatch.chdir(tmp_path)
    assert "answers a request or passes it on" in check_hook("router_middleware", name).passed


@pytest.mark.parametrize("name", NAMES)
def test_it_declares_what_it_does_to_tokens_so_that_nothing_is_compared(name):
    need(name)
    (hook,) = resolve_middleware([name])
    assert hook.target.changes_tokens is (name == "prefix_tokens")
    assert hook.origin.distribution == "miles-router"


def test_a_router_without_middleware_imports_none():
    code = "import sys, miles_router.server; print([m for m in sys.modules if 'miles_router.middlewares' in m])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["prefix_tokens", "response_cache"])
def test_who_reads_whole_bodies_refuses_long_ones_and_blames_nobody_for_a_client_that_left(serve, routed, engine, name):
    (hook,) = resolve_middleware([name])

    async def main():
        backend = engine()
        async with serve(backend) as url, routed(url, middleware=[hook.target], router_max_body_bytes=100) as r:
            reply = await r.post(content=b"x" * 101)
            assert (reply.status_code, backend.requests) == (413, [])
            assert "--router-max-body-bytes 100" in reply.text
            _, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 50\r\n\r\nhalf")
            row = {"calls": 0}
            while row["calls"] < 2:
                (row,) = (await r.client.get("/hooks")).json()["hooks"]
            writer.close()
            assert (await r.post(content=b"{}")).status_code == 200
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert (row["calls"], row["errors"]) == (3, 0)

    asyncio.run(main())


@pytest.mark.parametrize("name", ["prefix_tokens", "response_cache"])
def test_who_reads_whole_bodies_counts_them_among_those_of_all_requests(serve, routed, engine, name):
    (hook,) = resolve_middleware([name])

    async def main():
        async with serve(engine()) as url, routed(url, middleware=[hook.target], router_max_body_memory=1000) as r:
            _, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: 900\r\n\r\n" + bytes(800))
            while r.app.bodies.held != 800:
                await asyncio.sleep(0.005)
            answer = await r.post(content=b"x" * 300)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "body_memory_full")
            writer.close()
            while r.app.bodies.held:
                await asyncio.sleep(0.005)
            assert (await r.post(content=b"x" * 300)).status_code == 200
            assert r.app.bodies.held == 0

    asyncio.run(main())
