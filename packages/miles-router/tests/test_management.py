"""The router's own endpoints."""

from __future__ import annotations

import asyncio
import json
from urllib.parse import quote

import pytest

A, B = "http://127.0.0.1:30001", "http://127.0.0.1:30002"


def test_workers_are_added_listed_and_removed_the_old_way(routed):
    async def main():
        async with routed() as r:
            for url in (A, B + "/"):
                assert (await r.client.post("/add_worker", params={"url": url})).status_code == 200
            assert (await r.client.get("/list_workers")).json() == {"urls": [A, B]}
            assert (await r.client.post("/remove_worker", params={"url": A})).status_code == 200
            assert (await r.client.get("/list_workers")).json() == {"urls": [B]}

    asyncio.run(main())


def test_workers_are_added_listed_and_removed_the_new_way(routed):
    async def main():
        async with routed() as r:
            for url in (A, B):
                await r.client.post("/workers", json={"url": url, "worker_type": "regular"})
            rows = await r.workers()
            assert [(row["url"], row["healthy"], row["outstanding"], row["weight_version"]) for row in rows] == [
                (A, True, 0, ""),
                (B, True, 0, ""),
            ]
            assert (await r.client.delete("/workers/" + quote(A, safe=""))).status_code == 200
            assert (await r.client.delete("/workers/" + rows[1]["id"])).status_code == 200
            assert await r.workers() == []

    asyncio.run(main())


def test_adding_a_worker_twice_keeps_one(routed):
    async def main():
        async with routed() as r:
            for url in (A, A, A + "/"):
                await r.client.post("/add_worker", params={"url": url})
            assert len(await r.workers()) == 1

    asyncio.run(main())


def test_removing_an_unknown_worker_is_a_404_that_lists_the_known(routed):
    async def main():
        async with routed(A) as r:
            answer = await r.client.post("/remove_worker", params={"url": B})
        assert answer.status_code == 404
        assert B in answer.text
        assert A in answer.text

    asyncio.run(main())


@pytest.mark.parametrize(
    "url",
    [
        "",
        "127.0.0.1:1",
        "https://h:1",
        "http://h",
        "http://h:1/path",
        "http://u:p@h:1",
        "http://h:99999",
        "ftp:",
        "http://h h:1",
        "http://h%0d%0ax:1",
        "http://h,i:1",
        "http://\u00e9:1",
        "http://[::1:1",
        "http://:1",
    ],
)
def test_what_is_not_an_engines_address_is_refused(routed, url):
    async def main():
        async with routed() as r:
            for answer in (
                await r.client.post("/add_worker", params={"url": url}),
                await r.client.post("/workers", json={"url": url}),
            ):
                assert answer.status_code == 400
                assert "http" in answer.json()["error"]["message"]
            assert await r.workers() == []

    asyncio.run(main())


def test_a_malformed_body_or_method_is_refused_with_a_reason(routed):
    async def main():
        async with routed() as r:
            assert (await r.client.post("/workers", content=b"{nope")).status_code == 400
            assert "url" in (await r.client.post("/workers", json={})).json()["error"]["message"]
            answer = await r.client.put("/workers")
            assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")

    asyncio.run(main())


def test_health_says_which_kind_of_healthy_it_is(serve, routed, engine):
    async def main():
        async with serve(engine()) as url, routed() as r:
            answer = await r.client.get("/health")
            assert (answer.status_code, answer.json()["status"]) == (200, "no_workers")
            r.app.registry.add(url)
            answer = await r.client.get("/health")
            assert (answer.status_code, answer.json()) == (200, {"status": "healthy", "workers": 1, "healthy": 1})

    asyncio.run(main())


def test_with_a_token_everything_but_health_needs_it(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url, router_token="s3cret") as r:
            calls = [
                ("GET", "/workers"),
                ("POST", f"/add_worker?url={A}"),
                ("POST", f"/remove_worker?url={url}"),
                ("DELETE", "/workers/worker-0"),
                ("POST", "/generate"),
                ("POST", "/v1/chat/completions"),
                ("GET", "/v1/models"),
                ("GET", "/nothing"),
            ]
            for method, path in calls:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                    assert (await r.client.request(method, path, headers=headers)).status_code == 401
            assert target.requests == []
            good = {"authorization": "Bearer s3cret"}
            assert (await r.client.get("/list_workers", headers=good)).json() == {"urls": [url]}
            assert (await r.post(headers=good)).status_code == 200
            assert (await r.client.get("/health")).status_code == 200

    asyncio.run(main())


def test_a_web_page_can_neither_register_an_engine_nor_use_one(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            for path in (f"/add_worker?url={A}", "/generate", "/v1/completions"):
                for origin in ("http://evil.example", "null"):
                    assert (await r.post(path, headers={"origin": origin})).status_code == 403
            assert [row["url"] for row in await r.workers()] == [url]
        assert target.requests == []

    asyncio.run(main())


@pytest.mark.parametrize("size", [11, 100_000])
@pytest.mark.parametrize("path", ["/generate", "/workers"])
def test_a_body_over_the_limit_is_refused_and_the_next_request_served(serve, routed, engine, path, size):
    async def parts():
        for start in range(0, size, 10_000):
            yield b"x" * min(10_000, size - start)

    async def main():
        target = engine()
        async with serve(target) as url, routed(url, router_max_body_bytes=10) as r:
            for content in (b"x" * size, parts()):
                answer = await r.post(path, content=content)
                assert (answer.status_code, "--router-max-body-bytes 10" in answer.text) == (413, True)
            assert target.requests == []
            assert (await r.post(content=b"x" * 10)).status_code == 200

    asyncio.run(main())


def test_an_absolute_request_target_does_not_choose_the_destination(serve, routed, engine):
    async def main():
        registered, stranger = engine(b"registered"), engine(b"stranger")
        async with serve(registered) as a, serve(stranger) as b, routed(a) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(
                b"GET %s/v1/x HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % (b.encode(), b[7:].encode())
            )
            assert (await reader.read()).endswith(b"registered")
            writer.close()
        assert stranger.requests == []

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/abort_request", "/workers", "/weight_version"])
def test_what_is_for_the_router_itself_is_small_whatever_an_engine_may_be_sent(routed, path):
    async def main():
        async with routed(router_max_body_bytes=1 << 20) as r:
            body = json.dumps({"rid": "r" * (1 << 17), "url": A, "weight_version": "1"}).encode()
            assert (await r.client.post(path, content=body)).status_code == 413
            assert await r.workers() == []

    asyncio.run(main())


def test_requests_are_aborted_at_all_engines_by_their_id_and_never_those_of_others(routed, listen):
    told, mine = [], "of-this-run-alone"

    async def engine(reader, writer):
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
        told.append((head.partition(b" http")[0], json.loads(await reader.readexactly(length))))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{}")
        await writer.drain()

    async def main():
        async with listen(engine) as one, listen(engine) as two, routed(one, two, A) as r:
            done = await r.client.post("/abort_request", json={"rid": mine})
            assert (done.status_code, [row["url"] for row in done.json()["failed"]]) == (200, [A])
            for others in ({"rid": mine, "abort_all": True}, {"rid": "all-of-us"}, {}):
                assert (await r.client.post("/abort_request", json=others)).status_code == 400

    asyncio.run(main())
    assert told == [(b"post /abort_request", {"rid": mine})] * 2
