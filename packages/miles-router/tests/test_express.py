"""The short way: the same bytes as on the long one, whatever pieces they come in, and as much memory as a piece."""

from __future__ import annotations

import asyncio
import contextlib

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn import Config
from uvicorn.server import ServerState

from miles_router import RouterOptions
from miles_router.app import RouterApp
from miles_router.connection import UpstreamConnection
from miles_router.heads import not_forwarded
from miles_router.known_heads import KnownAnswers, KnownRequests, cut_head
from miles_router.protocol import BoundedProtocol

HEAD = b"POST /generate?a=1 HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nX-Own: 1\r\n\r\n"
BODY = b"GET / HTTP/1.1\r\n\r\n{}"
SENT = b"POST /generate?a=1 HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\nx-own: 1\r\ncontent-length: %d\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 12\r\nx-more: 2\r\n\r\nhello\r\n\r\nyou"
STREAM = (
    b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ntransfer-encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n1;x=y\r\n \r\n3\r\nyou\r\n0\r\nx-trailer: 1\r\n\r\n"
)


class Wire(asyncio.Transport):
    """A transport that notes what is written and never sends it."""

    def __init__(self):
        super().__init__()
        self.data = b""
        self.closed = self.paused = False

    def write(self, data):
        self.data += data

    def writelines(self, pieces):
        self.data += b"".join(pieces)

    def get_write_buffer_size(self):
        return 0

    def is_closing(self):
        return self.closed

    def pause_reading(self):
        self.paused = True

    def resume_reading(self):
        self.paused = False

    def close(self):
        self.closed = True

    abort = close


class Between:
    """A router without sockets: a client's protocol, and idle connections to its engines."""

    def __init__(self, engines=1, **options):
        self.app = RouterApp(RouterOptions(**options))
        config = Config(self.app, http=BoundedProtocol, lifespan="off", proxy_headers=False, log_config=None)
        config.load()
        self.client = BoundedProtocol(config=config, server_state=ServerState(), app_state={})
        self.to_client = Wire()
        self.client.connection_made(self.to_client)
        self.upstream = []
        for number in range(engines):
            worker = self.app.registry.add(f"http://127.0.0.{number + 1}:9")
            self.upstream.append(connection := UpstreamConnection(worker.pool))
            connection.connection_made(Wire())
            worker.pool.put(connection)

    def written(self, number=0):
        return self.upstream[number]._transport.data

    async def gets(self, data, number=0):
        """Wait until an engine got exactly this."""
        for _ in range(100):
            if len(self.written(number)) >= len(data):
                break
            await asyncio.sleep(0)
        assert self.written(number) == data

    async def answers(self, pieces, number=0):
        for piece in pieces:
            self.upstream[number].data_received(piece)
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)


def _cut(data, places):
    places = sorted({place for place in places if 0 < place < len(data)})
    return [data[a:b] for a, b in zip([0, *places], [*places, len(data)], strict=True)]


class Answer:
    """An answer as a client reads it."""

    def __init__(self, data):
        self.headers, self.body, self.complete = [], b"", False
        parser = httptools.HttpResponseParser(self)
        parser.feed_data(data)
        self.status = parser.get_status_code()

    def on_header(self, name, value):
        if not self.body:
            self.headers.append((name, value))

    def on_body(self, data):
        self.body += data

    def on_message_complete(self):
        self.complete = True


def _exchange(request, answer):
    """Return what the client gets for pieces of a request and of its answer; the engine has to get the same always."""

    async def main():
        r = Between()
        whole = HEAD % len(BODY) + BODY
        for again in range(2):  # the second time the heads are known
            r.to_client.data = r.upstream[0]._transport.data = b""
            for piece in _cut(whole, request):
                r.client.data_received(piece)
                await asyncio.sleep(0)
            await r.gets(SENT % len(BODY) + BODY)
            await r.answers(answer)
            assert r.app.bodies.held == r.app.registry.healthy[0].outstanding == 0
            assert not r.to_client.closed
            assert len(r.app.registry.healthy[0].pool._idle) == 1, again
        assert r.app.metrics.statuses == {200: 2}
        return r.to_client.data

    return asyncio.run(main())


def test_wherever_a_request_is_cut_its_engine_gets_the_same_bytes():
    places = range(len(HEAD % len(BODY) + BODY))
    assert [place for place in places if _exchange([place], [ANSWER]) != ANSWER] == []


def test_wherever_an_answer_is_cut_the_client_gets_the_same_bytes():
    places = range(len(ANSWER))
    assert [place for place in places if _exchange([], _cut(ANSWER, [place])) != ANSWER] == []


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 130), max_size=6),
    st.sampled_from([ANSWER, STREAM]),
    st.lists(st.integers(1, 150), max_size=8),
)
def test_any_pieces_of_request_and_answer_say_the_same(request, answer, places):
    got = Answer(_exchange(request, _cut(answer, places)))
    body = b"hello you" if answer is STREAM else b"hello\r\n\r\nyou"
    framing = (b"transfer-encoding", b"chunked") if answer is STREAM else (b"content-length", b"12")
    assert (got.status, got.body, got.complete) == (200, body, True)
    assert {(b"server", b"uvicorn"), framing} <= set(got.headers)
    assert b"x-trailer" not in dict(got.headers)


def test_a_plain_request_makes_no_task(monkeypatch):
    async def main():
        r = Between()
        for _ in range(2):
            with monkeypatch.context() as patch:
                patch.setattr(asyncio.get_running_loop(), "create_task", None)
                r.client.data_received(HEAD % 2 + b"{}")
                r.upstream[0].data_received(ANSWER)
        assert r.to_client.data == ANSWER * 2

    asyncio.run(main())


@pytest.mark.parametrize(
    "head",
    [
        HEAD.replace(b"X-Own: 1", b"Expect: 100-continue"),
        HEAD.replace(b"X-Own: 1", b"X-Miles-Weight-Version: 7"),
        HEAD.replace(b"X-Own: 1", b"Connection: close"),
        HEAD.replace(b"HTTP/1.1", b"HTTP/1.0"),
        HEAD.replace(b"POST /generate", b"POST /v1/%%67"),
    ],
)
def test_what_is_not_plain_goes_the_long_way(head):
    async def main():
        r = Between()
        r.app.registry.add(r.app.registry.healthy[0].url, "7")
        r.client.data_received(head % 2 + b"{}")
        assert r.written() == b""
        while not r.written():
            await asyncio.sleep(0)
        await r.answers([ANSWER])
        assert Answer(r.to_client.data.removeprefix(b"HTTP/1.1 100 Continue\r\n\r\n")).complete

    asyncio.run(main())


@pytest.mark.parametrize("before", [b"", HEAD % 1 + b"x"])
def test_what_looks_like_a_request_in_the_middle_of_a_head_is_none(before):
    async def main():
        r = Between()
        if before:
            r.client.data_received(before)
            await r.answers([ANSWER])
            r.upstream[0]._transport.data = b""
        r.client.data_received(b"POST /v1/a HTTP/1.1\r\nx-inner: ")
        r.client.data_received(HEAD % 5 + b"hello")
        assert r.written() == b""
        while not r.written():
            await asyncio.sleep(0)
        assert r.written().startswith(b"POST /v1/a HTTP/1.1\r\nx-inner: POST /generate?a=1 HTTP/1.1\r\nhost: h\r\n")

    asyncio.run(main())


def test_requests_sent_at_once_are_answered_one_by_one_in_their_order():
    async def main():
        r = Between()
        r.client.data_received(b"".join(HEAD % 1 + b"%d" % number for number in range(5)))
        for number in range(5):
            await r.gets(SENT % 1 + b"%d" % number)
            assert r.to_client.paused or number == 4
            r.upstream[0]._transport.data = b""
            await r.answers([ANSWER.replace(b"you", b"yo%d" % number)])
        assert r.to_client.data == b"".join(ANSWER.replace(b"you", b"yo%d" % number) for number in range(5))
        assert not r.to_client.paused

    asyncio.run(main())


def test_a_second_answer_reaches_nobody():
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x")
        await r.answers([ANSWER + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"])
        assert r.to_client.data == ANSWER
        assert r.upstream[0]._transport.closed
        assert r.app.registry.healthy[0].pool.take_idle() is None

    asyncio.run(main())


def test_a_request_whose_engine_fails_goes_whole_to_another_one():
    async def main():
        r = Between(engines=2)
        r.client.data_received(HEAD % 8 + b"half")
        r.client.data_received(b"full" + HEAD % 1 + b"x")  # and the next request behind it
        first = next(number for number in (0, 1) if r.written(number))
        r.upstream[first].data_received(b"HTTP/1.1 2")
        r.upstream[first].connection_lost(ConnectionResetError())
        await r.gets(SENT % 8 + b"halffull", 1 - first)
        r.upstream[1 - first]._transport.data = b""
        await r.answers([ANSWER], 1 - first)
        assert r.to_client.data == ANSWER
        assert [worker.failed for worker in r.app.registry] == [first == 0, first == 1]
        list(r.app.registry)[first].healthy = False
        r.app.registry.healthy = [list(r.app.registry)[1 - first]]
        await r.gets(SENT % 1 + b"x", 1 - first)

    asyncio.run(main())


def test_a_client_that_leaves_in_its_body_leaves_nothing_behind():
    async def main():
        r = Between()
        r.client.data_received(HEAD % 100 + b"some")
        assert r.app.bodies.held == 4
        r.client.connection_lost(None)
        assert r.app.bodies.held == 0
        assert r.written() == b""

    asyncio.run(main())


def test_a_client_that_leaves_amid_a_stream_closes_the_engines_connection_at_once():
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x")
        r.upstream[0].data_received(STREAM[:90])
        r.client.connection_lost(None)
        assert r.upstream[0]._transport.closed
        assert r.app.registry.healthy[0].outstanding == 0
        assert r.app.metrics.statuses == {499: 1}
        assert not r.app._proxy.exchanges._of

    asyncio.run(main())


@pytest.mark.parametrize("framed", [True, False])
def test_an_engine_is_not_read_while_its_client_does_not_read(framed):
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x")
        head = b"content-length: 1000000" if framed else b"transfer-encoding: chunked"
        r.upstream[0].data_received(b"HTTP/1.1 200 OK\r\n" + head + b"\r\n\r\n")
        piece = b"x" * 4096 if framed else b"1000\r\n" + b"x" * 4096 + b"\r\n"
        r.upstream[0].data_received(piece)
        assert not r.upstream[0]._transport.paused
        r.client.pause_writing()
        r.upstream[0].data_received(piece)
        assert r.upstream[0]._transport.paused
        assert r.to_client.data.count(b"x" * 4096) == 2  # nothing is kept back
        r.client.resume_writing()
        assert not r.upstream[0]._transport.paused

    asyncio.run(main())


@pytest.mark.parametrize("framed", [True, False])
def test_an_answer_waits_with_its_engine_for_a_slow_client(listen, routed, framed):
    size, sent = 48 << 20, 0

    async def big(reader, writer):
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        framing = b"content-length: %d" % size if framed else b"transfer-encoding: chunked"
        writer.write(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n\r\n")
        while sent < size:
            writer.write(bytes(1 << 16) if framed else b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            sent += 1 << 16
            await writer.drain()
        writer.write(b"" if framed else b"0\r\n\r\n")
        await reader.read()

    async def main():
        async with (
            listen(big) as url,
            routed(url) as r,
            r.client.stream("POST", "/generate", content=b"x") as answer,
        ):
            before, stalled = -1, 0
            while stalled < 20:  # until the engine gets rid of nothing more
                stalled, before = stalled + 1 if sent == before else 0, sent
                await asyncio.sleep(0.005)
            assert sent < size / 2
            assert sum([len(piece) async for piece in answer.aiter_raw()]) == size

    asyncio.run(main())


_LINES = st.sampled_from([
    b"Content-Length: 5", b"content-length: 5", b"Content-Length: 05", b"CONTENT-LENGTH: 7", b"Content-Length:5",
    b"X: \r\nContent-Length: 3", b"X: Content-Length: 9", b" Content-Length: 8", b"Content-Length : 5", b"X: 1",
    b"Content-Length: +5", b"Content-Length: 5 ", b"Content-Length: 0x5", b"X\rContent-Length: 4", b"X: \x00", b"",
    b"Connection: keep-alive", b"Connection: upgrade", b"Connection: close", b"Upgrade: h2c", b"Host: h",
    b"Transfer-Encoding: chunked",
])  # fmt: skip


class Request:
    """What llhttp makes of one message."""

    def __init__(self, data):
        self.body, self.complete, self.headers = b"", 0, []
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.parser.feed_data(data)

    def on_header(self, name, value):
        self.headers.append((name.lower(), value))

    def on_body(self, data):
        self.body += data

    def on_message_complete(self):
        self.complete += 1


@settings(max_examples=400, deadline=None)
@given(st.lists(_LINES, max_size=6), st.integers(0, 20))
def test_a_head_that_is_known_by_its_bytes_is_what_its_parser_says(lines, size):
    data = b"\r\n".join([b"POST /generate HTTP/1.1", *lines]) + b"\r\n\r\n" + b"b" * size
    known = KnownRequests(lambda _path, _headers: True, lambda _path: True, not_forwarded(keep_authorization=True))
    cut = cut_head(data)
    head = cut and known.find(cut[0], cut[1])
    if head:
        whole = data[: cut[3]] + b"b" * cut[2]
        parsed = Request(whole)
        assert (parsed.complete, parsed.body) == (1, b"b" * cut[2])
        assert [name for name, _ in parsed.headers].count(b"content-length") == 1
        again = Request(head.start + b"%d\r\n\r\n" % cut[2] + b"b" * cut[2])
        assert (again.complete, again.body) == (1, parsed.body)


@settings(max_examples=400, deadline=None)
@given(st.lists(_LINES, max_size=6))
def test_an_answers_head_that_is_passed_on_by_its_bytes_is_what_its_parser_says(lines):
    data = b"\r\n".join([b"HTTP/1.1 200 OK", *lines]) + b"\r\n\r\n"
    cut = cut_head(data)
    if cut and KnownAnswers().find(cut[0], cut[1]):
        got = Answer(data[: cut[3]] + b"b" * cut[2])
        assert (got.status, got.body, got.complete) == (200, b"b" * cut[2], True)
        assert not {name.lower() for name, _ in got.headers} & {b"connection", b"transfer-encoding", b"upgrade"}


def test_the_heads_that_are_remembered_are_bounded():
    known = KnownRequests(lambda _path, _headers: True, lambda _path: True, not_forwarded(keep_authorization=True))
    for number in range(5000):
        cut = cut_head(HEAD.replace(b"X-Own: 1", b"X-Own: %d" % number) % 5 + b"hello")
        assert known.find(cut[0], cut[1])
    assert len(known._known) <= 1024
