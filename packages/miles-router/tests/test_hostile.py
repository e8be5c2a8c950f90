"""Requests that are not what they seem, and clients that take their time."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_router import protocol

_HEAD = b"POST /generate HTTP/1.1\r\nhost: h\r\n"


async def _send(r, data):
    """Send bytes and return everything that comes back until the router closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
    with contextlib.suppress(ConnectionError):
        writer.write(data)
        return await asyncio.wait_for(reader.read(), 10)
    return b""


@pytest.mark.parametrize(
    "request_",
    [
        _HEAD + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /v1/smuggled HTTP/1.1\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\nGET /v1/smuggled HTTP/1.1\r\n\r\n",
        _HEAD + b"content-length: 4\r\ncontent-length: 40\r\n\r\nabcd",
        _HEAD + b"content-length: 4, 4\r\n\r\nabcd",
        _HEAD + b"content-length: +4\r\n\r\nabcd",
        _HEAD + b"content-length: -1\r\n\r\n",
        _HEAD + b"content-length: 0x4\r\n\r\nabcd",
        _HEAD + b"content-length: 99999999999999999999\r\n\r\nabcd",
        _HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n-4\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked\r\n\r\n4\r\nabcdefgh\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: xchunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"transfer-encoding: chunked, identity\r\n\r\n4\r\nabcd\r\n0\r\n\r\n",
        _HEAD + b"content-length : 4\r\n\r\nabcd",
        _HEAD + b"x-a: b\rx-injected: c\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x-a: b\nx-injected: c\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x-a: \x00\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x-a\x00: b\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x a: b\r\ncontent-length: 0\r\n\r\n",
        _HEAD + b"x-a: b\r\n folded: c\r\ncontent-length: 0\r\n\r\n",
        b"POST /generate\x00 HTTP/1.1\r\nhost: h\r\n\r\n",
        b"POST /generate HTTP/9.9\r\nhost: h\r\n\r\n",
        b"POST generate HTTP/1.1\r\nhost: h\r\n\r\n",
        b"POST http://h:99999/generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n",
        b"POST http://h HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n",
        b"POST /generate HTTP/1.1 x\r\nhost: h\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
)
def test_an_ambiguous_or_broken_request_is_refused_and_reaches_no_engine(serve, routed, engine, request_):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            answer = await _send(r, request_ + b"\r\n\r\n")
            assert answer[:13] in (b"HTTP/1.1 400 ", b"")
            assert answer.count(b"HTTP/1.1 ") <= 1
            assert target.requests == []
            assert (await r.post(content=b"x")).status_code == 200

    asyncio.run(main())


def test_what_follows_a_request_is_the_next_request_and_never_part_of_the_first(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            second = b"POST /flush_cache HTTP/1.1\r\nhost: h\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
            answer = await _send(r, _HEAD + b"content-length: 4\r\n\r\nabcd" + second)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 404 " in answer
        assert [body for _, body in target.requests] == [b"abcd"]

    asyncio.run(main())


def test_an_upgrade_is_not_taken_up(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            upgrade = b"GET /v1/models HTTP/1.1\r\nhost: h\r\nconnection: upgrade, close\r\nupgrade: %s\r\n\r\n"
            for kind in (b"websocket", b"h2c"):
                await _send(r, upgrade % kind + b"POST /v1/smuggled HTTP/1.1\r\ncontent-length: 0\r\n\r\n")
        assert {scope["path"] for scope, _ in target.requests} <= {"/v1/models"}
        assert all(b"upgrade" not in dict(scope["headers"]) for scope, _ in target.requests)

    asyncio.run(main())


def test_a_header_of_an_escaped_line_end_stays_what_it_is(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            await r.client.get("/v1/%0d%0ax-injected:%201?q=%0d%0ax-injected:%201", headers={"x-a": "%0d%0ax-b: c"})
        scope = target.requests[0][0]
        assert (scope["raw_path"], scope["query_string"]) == (b"/v1/%0d%0ax-injected:%201", b"q=%0d%0ax-injected:%201")
        assert b"x-injected" not in dict(scope["headers"])

    asyncio.run(main())


@pytest.mark.parametrize(
    "head",
    [
        [b"x-%d: %s\r\n" % (n, b"v" * 1000) for n in range(100)],
        [b"x-long: ", *[b"v" * 1000] * 1000],
        [b"x: y\r\n"] * 20_000,
    ],
    ids=["many long ones", "one very long one", "very many"],
)
@pytest.mark.parametrize("piecewise", [False, True])
def test_a_head_that_is_too_long_is_refused(serve, routed, engine, head, piecewise):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            with contextlib.suppress(ConnectionError):
                writer.write(_HEAD)
                for piece in head if piecewise else [b"".join(head)]:
                    writer.write(piece)
                    await writer.drain()
                writer.write(b"\r\n")
            with contextlib.suppress(ConnectionError):
                assert (await asyncio.wait_for(reader.read(), 10)).startswith((b"HTTP/1.1 431 ", b"HTTP/1.1 400 "))
            assert target.requests == []
            assert (await r.post()).status_code == 200

    asyncio.run(main())


def test_a_long_body_in_one_piece_with_its_head_is_no_long_head(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            for _ in range(2):
                assert (await r.post(content=b"x" * 200_000)).status_code == 200

    asyncio.run(main())


def test_trailers_are_neither_headers_nor_kept(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            head = _HEAD + b"connection: close\r\ntransfer-encoding: chunked\r\n\r\n"
            answer = await _send(r, head + b"2\r\nok\r\n0\r\nx-late: 1\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"x-late" not in dict(target.requests[0][0]["headers"])

    asyncio.run(main())


@pytest.mark.parametrize("line", [b"a: " + b"x" * 1000 + b"\r\n", b"x" * 1000], ids=["many", "one"])
def test_trailers_that_do_not_end_are_hung_up_on(routed, line):
    async def main():
        async with routed() as r:
            _, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(_HEAD + b"transfer-encoding: chunked\r\n\r\n0\r\na: ")
            sent = 0
            with contextlib.suppress(ConnectionError):
                while sent < 20_000_000:
                    writer.write(line * 50)
                    await writer.drain()
                    sent += 50_000
            assert sent < 20_000_000
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("second", [b"GET /v1/models HTTP/1.1\r\n" + b"x-a: %s\r\n" % (b"v" * 1000) * 200, b"GET /v1"])
def test_nothing_is_written_into_an_answer_under_way(listen, routed, monkeypatch, second):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.1)
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.02)
    ends = asyncio.Event()

    async def slow(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nhalf")
        await ends.wait()
        writer.write(b"full")

    async def main():
        async with listen(slow) as url, routed(url) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            writer.write(_HEAD + b"content-length: 0\r\n\r\n")
            answer = await reader.readuntil(b"half")
            for piece in second.splitlines(keepends=True):
                writer.write(piece)
                await asyncio.sleep(0)
            asyncio.get_running_loop().call_later(0.4, ends.set)  # four times the limit of the second head
            with contextlib.suppress(ConnectionError):
                answer += await asyncio.wait_for(reader.read(), 10)
            body = answer.partition(b"\r\n\r\nhalf")[2]
            assert body == b"" or body.startswith((b"fullHTTP/1.1 408 ", b"fullHTTP/1.1 431 "))
            assert len(second) > 100 or body
            writer.close()

    asyncio.run(main())


@pytest.mark.parametrize("size", [400_000, 40_000_000], ids=["held by the server", "held by the engine"])
def test_a_client_that_never_reads_its_answer_gives_its_place_back(serve, routed, engine, monkeypatch, size):
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.02)

    async def main():
        target = engine(b"x" * size)
        async with serve(target) as url, routed(url, router_request_timeout=0.3, router_max_worker_requests=1) as r:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", r.port))
            sock.sendall(_HEAD + b"content-length: 0\r\n\r\n")
            await r.until(lambda row: row["sent"] == 1)
            target.body = b"short"
            assert (await r.post()).text == "short"
            sock.close()

    asyncio.run(main())


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /gen", _HEAD, _HEAD + b"content-length: 10\r\n\r\nabc"],
    ids=["nothing", "a line", "headers", "a body"],
)
def test_a_client_that_does_not_finish_its_request_is_hung_up_on(serve, routed, engine, monkeypatch, sent):
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S"):
        monkeypatch.setattr(protocol, name, 0.1)
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.02)

    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            assert (await _send(r, sent)).startswith(b"HTTP/1.1 408 ")
        assert target.requests == []

    asyncio.run(main())


def test_a_client_that_drips_headers_is_hung_up_on_all_the_same(routed, monkeypatch):
    monkeypatch.setattr(protocol, "HEAD_TIMEOUT_S", 0.2)
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.02)

    async def main():
        async with routed() as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            answer = asyncio.create_task(reader.read())
            writer.write(_HEAD)
            while not answer.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"x: y\r\n")
                await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                assert (await answer).startswith(b"HTTP/1.1 408 ")

    asyncio.run(main())


def test_a_request_that_takes_long_to_answer_and_an_idle_connection_are_not_slow_clients(
    serve, routed, engine, monkeypatch
):
    for name in ("HEAD_TIMEOUT_S", "BODY_TIMEOUT_S"):
        monkeypatch.setattr(protocol, name, 0.05)
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.01)

    async def main():
        target = engine()
        target.gate = asyncio.Event()
        async with serve(target) as url, routed(url) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            for _ in range(2):
                writer.write(_HEAD + b"content-length: 2\r\n\r\nok")
                await asyncio.sleep(0.3)  # six times the limit
                target.gate.set()
                assert (await reader.readuntil(b'"ok"}')).startswith(b"HTTP/1.1 200 ")
            writer.close()

    asyncio.run(main())


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(
    st.binary(max_size=40),
    st.sampled_from([
        b"POST /generate HTTP/1.1\r\n", b"GET /v1/models HTTP/1.1\r\n", b"host: h\r\n", b"content-length: 5\r\n",
        b"content-length: 0\r\n", b"transfer-encoding: chunked\r\n", b"\r\n", b"5\r\nhello\r\n", b"0\r\n\r\n", b"hello",
        b"connection: close\r\n", b"expect: 100-continue\r\n", b"\n", b"\x00", b"{}",
    ]),
), max_size=12).map(b"".join))  # fmt: skip
def test_whatever_arrives_the_engine_sees_whole_requests_only_and_the_router_lives(serve, routed, engine, data):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            with contextlib.suppress(ConnectionError):
                writer.write(data)
                writer.write_eof()
                await asyncio.wait_for(reader.read(), 10)
            writer.close()
            for scope, _ in target.requests:
                assert scope["path"] in ("/generate", "/v1/models")
                assert b"transfer-encoding" not in dict(scope["headers"])
            assert (await r.post()).status_code == 200

    asyncio.run(main())


@pytest.mark.parametrize(
    "line",
    [
        b"POST http://127.0.0.1:%d/generate HTTP/1.1",
        b"POST http://127.0.0.1:%d HTTP/1.1",
        b"POST //127.0.0.1:%d/generate HTTP/1.1",
        b"POST /generate?url=http://127.0.0.1:%d HTTP/1.1",
        b"CONNECT 127.0.0.1:%d HTTP/1.1",
        b"POST /v1/http://127.0.0.1:%d/ HTTP/1.1",
        b"POST /v1/@127.0.0.1:%d/ HTTP/1.1",
        b"GET /v1/proxy?worker=http://127.0.0.1:%d HTTP/1.1",
    ],
)
def test_an_address_that_a_request_names_is_never_called(serve, routed, engine, line):
    async def main():
        target, other = engine(), engine()
        async with serve(target) as url, serve(other) as elsewhere, routed(url) as r:
            port = int(elsewhere.rpartition(":")[2])
            names = b"host: 127.0.0.1:%d\r\nx-forwarded-host: 127.0.0.1:%d\r\nforwarded: host=127.0.0.1:%d\r\n"
            head = line % port + b"\r\n" + names % (port, port, port)
            head += b"x-worker-url: http://127.0.0.1:%d\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}" % port
            await _send(r, head)
            assert other.requests == []
            assert other.checks == 0
            assert [worker["url"] for worker in await r.workers()] == [url]
            assert all(scope["raw_path"].startswith(b"/") for scope, _ in target.requests)

    asyncio.run(main())


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_a_redirect_of_an_engine_is_not_followed(serve, routed, engine, status):
    async def main():
        other = engine()
        async with serve(other) as elsewhere:
            target = engine(b"", status, [(b"location", f"{elsewhere}/generate".encode())])
            target.health = 307
            async with serve(target) as url, routed(url) as r:
                answer = await r.post(content=b"{}")
                assert (answer.status_code, answer.headers["location"]) == (status, f"{elsewhere}/generate")
                r.app.registry.quarantine(next(iter(r.app.registry)), "to be asked for its health")
                await r.until(lambda row: row["reason"] == "answers /health with 307")
            assert (other.requests, other.checks) == ([], 0)

    asyncio.run(main())


def test_who_says_where_a_request_came_from_is_let_in_no_further(routed):
    async def main():
        async with routed(router_token="t") as r:
            for name in ("x-forwarded-for", "x-real-ip", "forwarded", "x-forwarded-host", "x-original-url"):
                for path in ("/workers", "/status"):
                    assert (await r.client.get(path, headers={name: "127.0.0.1"})).status_code == 401

    asyncio.run(main())


def test_a_client_that_drips_a_body_is_hung_up_on_all_the_same(serve, routed, engine, monkeypatch):
    monkeypatch.setattr(protocol, "BODY_TIMEOUT_S", 0.3)
    monkeypatch.setattr(protocol, "_SWEEP_S", 0.02)

    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
            answer = asyncio.create_task(reader.read())
            writer.write(_HEAD + b"content-length: 100000\r\n\r\n")
            while not answer.done():
                with contextlib.suppress(ConnectionError):
                    writer.write(b"x")
                await asyncio.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                assert (await answer).startswith(b"HTTP/1.1 408 ")
            assert target.requests == []
            assert r.app.bodies.held == 0

    asyncio.run(main())
