"""Who changes tokens says so, or is found out: the header that an answer then bears."""

from __future__ import annotations

import asyncio
import contextlib
import gzip

import httpx
import pytest
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import Response

from miles_router.middlewares.bodies import giving

STAMP = "x-miles-changed-tokens"
CHUNKS = [b"data: 1\n\n", b"data: 2\n\n", b"data: [DONE]\n\n"]


def in_steps(step):
    """Return an engine that answers in `CHUNKS` and waits for `step` after each."""

    async def streaming(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for chunk in CHUNKS:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await step.wait()
            step.clear()
        await send({"type": "http.response.body"})

    return streaming


class Passing:
    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)


async def posted(serve, routed, engine, *middleware, content=b'{"text": "x"}', **how):
    """Post to an engine behind `middleware`; return the reply, what the engine got, and the report's rows."""
    backend = engine(**how)
    async with serve(backend) as url, routed(url, middleware=middleware) as r:
        reply = await r.post(content=content)
        rows = (await r.client.get("/hooks")).json()["hooks"] if middleware else []
        return reply, [body for _, body in backend.requests], rows


@pytest.fixture
def post(serve, routed, engine):
    return lambda *middleware, **how: asyncio.run(posted(serve, routed, engine, *middleware, **how))


def test_an_answer_names_every_middleware_that_declares_to_change_tokens_outermost_first(post):
    class Outer(Passing):
        changes_tokens = True

    class Plain(Passing):
        pass

    class Inner(Passing):
        changes_tokens = True

    reply, _, rows = post(Outer, Plain, Inner)
    assert reply.headers[STAMP] == "test:Outer,test:Inner"
    assert [row["changes_tokens"] for row in rows] == [True, False, True]
    assert STAMP not in post(Plain)[0].headers
    assert STAMP not in post()[0].headers


def test_the_names_stay_whatever_an_outer_middleware_makes_of_the_headers(post):
    class Bare(Passing):
        async def __call__(self, scope, receive, send):
            async def bare(message):
                await send({**message, "headers": []} if message["type"] == "http.response.start" else message)

            await self.app(scope, receive, bare)

    class Inner(Passing):
        changes_tokens = True

    assert post(Bare, Inner)[0].headers[STAMP] == "test:Inner"


def test_who_declares_nothing_and_changes_an_answer_is_named_and_counted(post, caplog):
    class Meddler(Passing):
        async def __call__(self, scope, receive, send):
            async def other(message):
                if message["type"] == "http.response.body":
                    message = {**message, "body": message["body"].replace(b"ok", b"no")}
                await send(message)

            await self.app(scope, receive, other)

    reply, _, (row,) = post(Meddler)
    assert (reply.content, reply.headers[STAMP]) == (b'{"text": "no"}', "test:Meddler")
    assert row["changed_bodies"] == 1
    assert "test:Meddler changed a body (1 so far) and declares nothing" in caplog.text


def test_who_declares_nothing_and_changes_a_request_is_named(post):
    class Rewriter(Passing):
        async def __call__(self, scope, receive, send):
            async def other():
                message = await receive()
                return {**message, "body": b'{"text": "y"}'} if message["type"] == "http.request" else message

            await self.app(scope, other, send)

    reply, got, (row,) = post(Rewriter)
    assert got == [b'{"text": "y"}']
    assert (reply.headers[STAMP], row["changed_bodies"]) == ("test:Rewriter", 1)


def test_who_answers_by_itself_and_declares_nothing_is_named_but_not_for_a_refusal(post):
    class Cache(Passing):
        status = 200

        async def __call__(self, scope, receive, send):
            await send({"type": "http.response.start", "status": self.status, "headers": []})
            await send({"type": "http.response.body", "body": b"mine", "more_body": True})
            await send({"type": "http.response.body", "body": b" too"})

    class Refusing(Cache):
        status = 429

    assert post(Cache)[0].headers[STAMP] == "test:Cache"
    reply, _, (row,) = post(Refusing)
    assert (reply.content, STAMP in reply.headers, row["changed_bodies"]) == (b"mine too", False, 0)


def test_who_says_that_tokens_stay_is_believed(post):
    class Zipped(GZipMiddleware):
        changes_tokens = False

    how = {"body": b'{"text": "%s"}' % (b"a" * 5000)}
    reply, _, _ = post(Zipped, **how)
    assert (reply.headers["content-encoding"], STAMP in reply.headers) == ("gzip", False)
    assert STAMP in post(GZipMiddleware, **how)[0].headers


def test_bytes_that_are_cut_differently_are_the_same_bytes(post):
    class Buffering(Passing):
        async def __call__(self, scope, receive, send):
            request = await receive()
            pieces = [{**request, "body": request["body"][i : i + 1], "more_body": True} for i in range(5)]
            pieces.append({**request, "body": request["body"][5:]})

            async def again():
                return pieces.pop(0) if pieces else await receive()

            whole = []

            async def joined(message):
                if message["type"] == "http.response.start":
                    await send(message)
                    return
                whole.append(message.get("body", b""))
                if not message.get("more_body"):
                    await send({"type": "http.response.body", "body": b"".join(whole)})

            await self.app(scope, again, joined)

    reply, got, (row,) = post(Buffering)
    assert (reply.status_code, got) == (200, [b'{"text": "x"}'])
    assert (STAMP in reply.headers, row["changed_bodies"]) == (False, 0)


@pytest.mark.parametrize("swallowed", [(), Exception])
def test_an_answer_that_is_changed_after_it_began_is_cut_off(serve, routed, swallowed):
    class Late(Passing):
        async def __call__(self, scope, receive, send):
            async def other(message):
                body = message.get("body", b"").replace(b"2", b"3")
                with contextlib.suppress(swallowed):
                    await send({**message, "body": body} if message["type"] == "http.response.body" else message)
                if body:
                    step.set()  # the engine waits until its piece was passed on, or was not

            await self.app(scope, receive, other)

    step = asyncio.Event()

    async def main():
        async with serve(in_steps(step)) as url, routed(url, middleware=[Late]) as r:
            got = []
            with pytest.raises(httpx.RemoteProtocolError):  # noqa: PT012
                async with r.client.stream("POST", "/generate", content=b"x") as reply:
                    assert STAMP not in reply.headers
                    async for piece in reply.aiter_raw():
                        got.append(piece)  # noqa: PERF401  what came before the error counts
            assert got == CHUNKS[:1]
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert row["changed_bodies"] == 1

    asyncio.run(main())


class Again(Passing):
    """Sends a refused request once more; `body` is what it sends first, None for what came."""

    body = None

    async def __call__(self, scope, receive, send):
        request = await receive()
        for body in (self.body or request["body"], request["body"]):
            held = []

            async def hold(message, held=held):
                held.append(message)

            await self.app(scope, giving(body, receive), hold)
            if held[0]["status"] < 500:
                break
        for message in held:
            await send(message)


def test_who_asks_again_and_passes_on_what_was_answered_then_is_not_named(serve, routed):
    class Twice(Again):
        body = b"something else"

    def flaky():
        statuses = iter((500, 200))

        async def answer(scope, receive, send):
            got.append((await receive())["body"])
            status = next(statuses)
            await send({"type": "http.response.start", "status": status, "headers": []})
            await send({"type": "http.response.body", "body": b"answer %d" % status})

        return answer

    async def main(kind):
        async with serve(flaky()) as url, routed(url, middleware=[kind]) as r:
            reply = await r.post(content=b"x")
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert (reply.content, STAMP in reply.headers, row["changed_bodies"]) == (b"answer 200", False, 0)

    got = []
    asyncio.run(main(Again))
    asyncio.run(main(Twice))
    assert got == [b"x", b"x", b"something else", b"x"]


class Both(Passing):
    """Sends the beginning of one answer and then another one."""

    async def __call__(self, scope, receive, send):
        request = await receive()

        async def half(message):
            if message["type"] == "http.response.start":
                await send({**message, "headers": []})
            elif message["body"]:
                await send({**message, "body": message["body"][:5], "more_body": True})

        async def whole(message):
            if message["type"] != "http.response.start":
                await send(message)

        await self.app(scope, giving(request["body"], receive), half)
        await self.app(scope, giving(request["body"], receive), whole)


def test_half_of_one_answer_and_the_whole_of_another_are_a_change(serve, routed, engine):
    async def main():
        async with serve(engine()) as url, routed(url, middleware=[Both]) as r:
            with pytest.raises(httpx.RemoteProtocolError):
                await r.post(content=b"x")
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert row["changed_bodies"] == 1

    asyncio.run(main())


class Noting(BaseHTTPMiddleware):
    """Starlette's own base class, with what its users write."""

    async def dispatch(self, request, call_next):
        if request.headers.get("x-tenant") == "bad":
            return Response("no", status_code=403)
        body = await request.body()
        reply = await call_next(request)
        reply.headers["x-seen"] = str(len(body))
        return reply


def test_a_starlette_middleware_reads_rejects_and_adds_headers(serve, routed, engine):
    async def main():
        backend = engine()
        async with serve(backend) as url, routed(url, middleware=[Noting]) as r:
            reply = await r.post(content=b"12345")
            assert (reply.status_code, reply.content, reply.headers["x-seen"]) == (200, backend.body, "5")
            assert STAMP not in reply.headers
            assert backend.requests[0][1] == b"12345"
            assert (await r.post(content=b"x", headers={"x-tenant": "bad"})).status_code == 403
            (row,) = (await r.client.get("/hooks")).json()["hooks"]
            assert (row["calls"], row["errors"], row["changed_bodies"]) == (2, 0, 0)

    asyncio.run(main())


def test_a_stream_comes_through_a_starlette_middleware_as_it_is_sent(serve, routed):
    step = asyncio.Event()

    async def main():
        async with serve(in_steps(step)) as url, routed(url, middleware=[Noting]) as r:
            got = []
            async with r.client.stream("POST", "/generate", content=b"x") as reply:
                async for piece in reply.aiter_raw():
                    got.append(piece)
                    step.set()  # the engine waits until we have the piece
            assert got == CHUNKS

    asyncio.run(main())


def test_an_engine_learns_through_a_starlette_middleware_that_its_client_left(serve, routed):
    left = asyncio.Event()

    async def slow(scope, receive, send):
        while (await receive())["type"] != "http.disconnect":
            pass
        left.set()

    async def main():
        async with serve(slow) as url, routed(url, middleware=[Noting]) as r:
            request = asyncio.create_task(r.post(content=b"x"))
            await r.until(lambda row: row["outstanding"] == 1)
            request.cancel()
            await asyncio.wait_for(left.wait(), 10)
            await r.until(lambda row: row["outstanding"] == 0)

    asyncio.run(main())


def test_gzip_of_starlette_is_still_the_answer(post):
    body = b'{"text": "%s"}' % (b"a" * 5000)
    reply, _, _ = post(GZipMiddleware, body=body)
    assert reply.content == body == gzip.decompress(gzip.compress(body))


def test_a_middleware_may_let_a_request_go_to_some_engines_alone(serve, routed, engine):
    class Choosy:
        def __init__(self, app, *, router):
            self.app, self.router = app, router

        async def __call__(self, scope, receive, send):
            if scope["path"] == "/generate":
                assert self.router.loads == {worker.url: 0 for worker in self.router.workers if worker.healthy}
                old = [url for url, version in self.router.versions.items() if version == "1"]
                self.router.choose(scope, *old)
            await self.app(scope, receive, send)

    async def main():
        backends = [engine() for _ in range(3)]
        async with (
            serve(backends[0]) as a,
            serve(backends[1]) as b,
            serve(backends[2]) as c,
            routed(middleware=[Choosy]) as r,
        ):
            for url, version in ((a, "1"), (b, "2"), (c, "1")):
                r.app.registry.add(url, version)
            for _ in range(4):
                assert (await r.post(content=b"x")).status_code == 200
            assert [len(backend.requests) for backend in backends] == [2, 0, 2]
            for url in (a, c):
                r.app.registry.remove(url)
            r.app.registry.add(c, "1")
            r.app.registry.quarantine(next(w for w in r.app.registry if w.url == c), "is away")
            reply = await r.post(content=b"x")
            assert reply.status_code == 503
            assert f"none of the workers that middleware chose is healthy: {c}" in reply.text

    asyncio.run(main())
