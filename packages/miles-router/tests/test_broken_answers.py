"""Engines whose answers are not whole: what began at the client ends visibly, what did not goes to another engine."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct

import httpx
import pytest

_WAYS = pytest.mark.parametrize("limits", [{}, {"router_max_requests": 1000}], ids=["the short way", "with a queue"])
_ENDS = pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
_REQUEST = b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 2\r\n\r\n{}"


def _breaks(answer, *, reset=False):
    """Answer each request with these bytes, then end the connection."""

    async def speak(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await writer.drain()
            if reset:
                await asyncio.sleep(0.05)  # a reset overtakes what was sent just before
                plug = writer.get_extra_info("socket")
                plug.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.transport.abort()

    return speak


async def _raw(r):
    """Return everything that one request gets until the router closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", r.port)
    writer.write(_REQUEST)
    answer = b""
    with contextlib.suppress(ConnectionError):
        while piece := await asyncio.wait_for(reader.read(1 << 16), 10):
            answer += piece
    writer.close()
    return answer


@_WAYS
@_ENDS
@pytest.mark.parametrize(
    "begun",
    [b"", b"HT", b"HTTP/1.1 200 OK\r\ncontent-le", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\na: b\r\n"],
)
def test_an_answer_whose_head_does_not_end_is_asked_of_another_engine(
    listen, serve, routed, engine, begun, reset, limits
):
    async def main():
        async with (
            listen(_breaks(begun, reset=reset)) as bad,
            serve(engine(b"served")) as good,
            routed(bad, good, router_policy="round_robin", **limits) as r,
        ):
            assert [(await r.post(content=b"{}")).text for _ in range(4)] == ["served"] * 4
            rows = await r.workers()
            assert [row["outstanding"] for row in rows] == [0, 0]
            assert rows[0]["failed"] == 2

    asyncio.run(main())


@_WAYS
@_ENDS
@pytest.mark.parametrize(
    ("head", "sent"),
    [
        (b"content-length: 100", b"half"),
        (b"transfer-encoding: chunked", b"4\r\nhalf\r\n"),
        (b"transfer-encoding: chunked", b"4\r\nhalf\r\nff\r\nno"),
        (b"transfer-encoding: chunked", b"4\r\nhalf\r\n0\r\n"),
    ],
)
def test_a_client_sees_that_its_answer_was_cut_off_and_the_engine_is_noted(listen, routed, head, sent, reset, limits):
    async def main():
        answer = b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n" + sent
        async with listen(_breaks(answer, reset=reset)) as url, routed(url, **limits) as r:
            got = await _raw(r)
            assert got.startswith(b"HTTP/1.1 200 ")
            assert b"half" in got
            assert not got.endswith(b"0\r\n\r\n")
            await r.until(lambda row: (row["failed"], row["outstanding"]) == (1, 0))
            assert (await r.client.get("/status")).json()["statuses"] == {"502": 1}

    asyncio.run(main())


@_WAYS
@pytest.mark.parametrize(
    "sent", [b"4\r\nhalf\r\nzz\r\n", b"4\r\nhalfmore\r\n", b"4\r\nhalf\r\n-1\r\n", b"fffffffffffffffff\r\n"]
)
def test_chunks_that_are_none_cut_the_answer_off(listen, routed, sent, limits):
    async def main():
        answer = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + sent

        async def speak(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await reader.read()  # it would stay open

        async with listen(speak) as url, routed(url, **limits) as r:
            got = await _raw(r)
            assert not got.endswith(b"0\r\n\r\n")
            await r.until(lambda row: (row["failed"], row["outstanding"]) == (1, 0))

    asyncio.run(main())


@_WAYS
@pytest.mark.parametrize(
    "lengths", [b"content-length: 2\r\ncontent-length: 9", b"content-length: 2\r\ntransfer-encoding: chunked"]
)
def test_an_answer_of_two_lengths_is_never_read_as_two_answers(listen, routed, lengths, limits):
    async def main():
        poison = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"

        async def speak(reader, writer):
            while await reader.readuntil(b"\r\n\r\n"):
                writer.write(b"HTTP/1.1 200 OK\r\n" + lengths + b"\r\n\r\n2\r\nok\r\n0\r\n\r\n" + poison)

        async with listen(speak) as url, routed(url, **limits) as r:
            for _ in range(3):
                with contextlib.suppress(httpx.RemoteProtocolError):
                    assert "poison" not in (await r.post(content=b"{}")).text

    asyncio.run(main())


@_WAYS
def test_what_an_engine_sends_beyond_its_length_reaches_nobody(listen, routed, limits):
    connections = 0

    async def speak(reader, writer):
        nonlocal connections
        connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokpoison")
            await reader.read()

    async def main():
        async with listen(speak) as url, routed(url, **limits) as r:
            for _ in range(3):
                assert (await r.post(content=b"{}")).text == "ok"
        assert connections == 3

    asyncio.run(main())


@_WAYS
@pytest.mark.parametrize(
    "endless",
    [
        b"HTTP/1.1 200 OK\r\n%s" % (b"x-a: b\r\n" * 1000),
        b"HTTP/1.1 200 OK\r\nx: ",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 500,
    ],
    ids=["headers", "one header", "informational"],
)
def test_an_answer_whose_head_does_not_end_while_it_comes_is_not_waited_for(listen, routed, endless, limits):
    async def speak(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        while True:
            writer.write(endless)
            endless_more = b"x" * 10_000 if endless.endswith(b": ") else endless.removeprefix(b"HTTP/1.1 200 OK\r\n")
            for _ in range(10):
                writer.write(endless_more)
            await writer.drain()

    async def main():
        async with listen(speak) as url, routed(url, **limits) as r:
            answer = await r.post(content=b"{}")
            assert (answer.status_code, answer.json()["error"]["type"]) == (502, "worker_lost")

    asyncio.run(main())


@_WAYS
def test_trailers_that_do_not_end_cut_the_answer_off(listen, routed, limits):
    async def speak(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n0\r\n")
        while True:
            writer.write(b"x-a: b\r\n" * 10_000)
            await writer.drain()

    async def main():
        async with listen(speak) as url, routed(url, **limits) as r:
            assert not (await _raw(r)).endswith(b"0\r\n\r\n")

    asyncio.run(main())


@_WAYS
@pytest.mark.parametrize("status", [204, 304])
def test_an_answer_that_has_no_body_is_whole_whatever_length_it_claims(listen, routed, status, limits):
    async def speak(reader, writer):
        while await reader.readuntil(b"\r\n\r\n{}"):
            writer.write(b"HTTP/1.1 %d Bodiless\r\ncontent-length: 2\r\n\r\n" % status)

    async def main():
        async with listen(speak) as url, routed(url, **limits) as r:
            answers = [await r.post(content=b"{}") for _ in range(2)]
            assert [answer.status_code for answer in answers] == [status] * 2
            assert r.app.metrics.statuses == {status: 2}

    asyncio.run(main())


@_WAYS
@pytest.mark.parametrize("status", [b"099", b"600"])
def test_a_status_that_does_not_exist_is_no_answer(listen, routed, status, limits):
    async def main():
        answer = b"HTTP/1.1 " + status + b" What\r\ncontent-length: 0\r\n\r\n"

        async def speak(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            await reader.read()

        async with listen(speak) as url, routed(url, **limits) as r:
            assert (await r.post(content=b"{}")).status_code == 502

    asyncio.run(main())
