"""The router's own endpoints."""

from __future__ import annotations

import asyncio
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
    "url", ["", "127.0.0.1:1", "https://h:1", "http://h", "http://h:1/path", "http://u:p@h:1", "http://h:99999", "ftp:"]
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


def test_with_a_token_management_needs_it_and_generation_does_not(serve, routed, engine):
    async def main():
        async with serve(engine()) as url, routed(url, router_token="s3cret") as r:
            calls = [
                ("GET", "/workers"),
                ("POST", f"/add_worker?url={A}"),
                ("POST", f"/remove_worker?url={url}"),
                ("DELETE", "/workers/worker-0"),
            ]
            for method, path in calls:
                for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
                    assert (await r.client.request(method, path, headers=headers)).status_code == 401
            good = {"authorization": "Bearer s3cret"}
            assert (await r.client.get("/list_workers", headers=good)).json() == {"urls": [url]}
            assert (await r.post()).status_code == 200
            assert (await r.client.get("/health")).status_code == 200

    asyncio.run(main())


def test_a_web_page_cannot_register_an_engine(routed):
    async def main():
        async with routed() as r:
            answer = await r.client.post(f"/add_worker?url={A}", headers={"origin": "http://evil.example"})
            assert answer.status_code == 403
            assert await r.workers() == []

    asyncio.run(main())


def test_an_absolute_request_target_does_not_choose_the_destination(serve, routed, engine):
    async def main():
        registered, stranger = engine(b"registered"), engine(b"stranger")
        async with serve(registered) as a, serve(stranger) as b, routed(a) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(b"GET %s/x HTTP/1.1\r\nhost: %s\r\nconnection: close\r\n\r\n" % (b.encode(), b[7:].encode()))
            assert (await reader.read()).endswith(b"registered")
            writer.close()
        assert stranger.requests == []

    asyncio.run(main())
