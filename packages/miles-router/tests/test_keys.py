"""Engines that ask for a key get it from the router, and nobody else does."""

from __future__ import annotations

import asyncio
import json

import pytest

KEY = "of-the-engines"
SHOWN = {"authorization": "Bearer of-the-client"}


class Locked:
    """An engine that answers who shows its key; keeps what was shown to it."""

    def __init__(self, key=KEY):
        self.key, self.shown = key, []

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        shown = [value.decode() for name, value in scope["headers"] if name == b"authorization"]
        if scope["path"] != "/health":
            self.shown.append((scope["path"], shown))
        status = 200 if shown == [f"Bearer {self.key}"] or scope["path"] == "/health" else 401
        # SGLang tells its own arguments, the key among them.
        about = {"api_key": self.key, "launch_command": f"--api-key {self.key}", "weight_version": "7"}
        body = json.dumps(about if status == 200 else {"error": "Unauthorized"}).encode()
        head = {"type": "http.response.start", "status": status, "headers": [(b"content-length", b"%d" % len(body))]}
        await send(head)
        await send({"type": "http.response.body", "body": body})


async def register(r, url, key=KEY, **more):
    answer = await r.client.post("/workers", json={"url": url, "api_key": key, **more})
    assert answer.status_code == 200, answer.text


# Limits send requests the long way, and so does a body in chunks.
@pytest.mark.parametrize("options", [{}, {"router_max_requests": 1}, {"router_token": "of-the-client"}])
def test_engines_get_their_key_in_the_place_of_what_a_client_shows(serve, routed, options):
    async def chunks():
        yield b"{}"

    async def main():
        one = Locked()
        async with serve(one) as url, routed(**options) as r:
            r.client.headers.update(SHOWN)
            await register(r, url)
            assert (await r.post(json={})).status_code == 200
            assert (await r.post(json={})).status_code == 200
            assert (await r.post(content=chunks())).status_code == 200
            assert (await r.client.get("/model_info")).status_code == 200
            assert (await r.client.post("/weight_version", json={"weight_version": "7"})).json()["held_back"] == []
        assert {path for path, _ in one.shown} == {"/generate", "/model_info"}
        assert all(shown == [f"Bearer {KEY}"] for _, shown in one.shown)

    asyncio.run(main())


def test_an_engine_without_a_key_gets_none_whatever_a_client_shows(serve, routed):
    async def main():
        one, other = Locked(), Locked()
        async with serve(one) as url, serve(other) as second, routed(url, router_policy="round_robin") as r:
            await register(r, second)
            for _ in range(4):
                await r.post(json={}, headers=SHOWN)
        assert [shown for _, shown in one.shown] == [[], []]
        assert [shown for _, shown in other.shown] == [[f"Bearer {KEY}"]] * 2

    asyncio.run(main())


@pytest.mark.parametrize(("engines", "key"), [(1, KEY), (2, KEY), (1, 'quo"te\\slash'), (2, '"')])
def test_no_answer_of_the_router_tells_a_key(serve, routed, engines, key):
    async def main():
        async with serve(Locked(key)) as one, serve(Locked(key)) as two, routed() as r:
            for url in (one, two)[:engines]:
                await register(r, url, key)
            for path in ("/server_info", "/get_server_info", "/workers", "/list_workers", "/status", "/metrics", "/"):
                answer = await r.client.get(path, headers=SHOWN)
                assert answer.status_code == 200
                assert key == '"' or json.dumps(key)[1:-1] not in answer.text
            assert (await r.client.get("/server_info")).json()["weight_version"] == "7"
            assert (await r.client.get("/server_info")).json()["api_key"] == ""

    asyncio.run(main())


def test_middleware_does_not_see_an_engine_registered_with_its_key(serve, routed):
    seen = []

    class Sees:
        def __init__(self, app, *, router):
            self.app = app

        async def __call__(self, scope, receive, send):
            seen.append((scope["path"], scope["headers"]))
            await self.app(scope, receive, send)

    async def main():
        async with serve(Locked()) as url, routed(middleware=[Sees]) as r:
            await register(r, url)
            assert (await r.post(json={})).status_code == 200

    asyncio.run(main())
    assert [path for path, _ in seen] == ["/generate"]
    assert KEY not in str(seen)


def test_a_known_engine_keeps_its_key_until_it_gets_another(serve, routed):
    async def main():
        one = Locked()
        async with serve(one) as url, routed() as r:
            await register(r, url, "an-older-one")
            assert (await r.post(json={})).status_code == 401
            await register(r, url)
            await register(r, url, None, weight_version="7")
            await r.client.post("/add_worker", params={"url": url})
            assert (await r.post(json={})).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize("key", ["two words", "a\r\nx-evil: 1", "schlüssel", "\x00"])
def test_a_key_that_no_header_may_hold_is_refused_and_not_shown(routed, key):
    async def main():
        async with routed() as r:
            answer = await r.client.post("/workers", json={"url": "http://127.0.0.1:1", "api_key": key})
            assert answer.status_code == 400
            assert key not in answer.text
            assert "127.0.0.1:1" in answer.text
            assert await r.workers() == []

    asyncio.run(main())
