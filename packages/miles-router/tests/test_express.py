"""The short way: the same bytes as on the long one, whatever pieces they come in, and as much memory as a piece."""

from __future__ import annotations

import asyncio
import contextlib
import random

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from uvicorn import Config
from uvicorn.server import ServerState

from miles_router import RouterOptions
from miles_router.app import RouterApp
from miles_router.connection import UpstreamConnection
from miles_router.errors import ConnectError, HungError, LocalError, SilentError
from miles_router.pool import ConnectionPool
from miles_router.protocol import BoundedProtocol

HEAD = b"POST /generate?a=1 HTTP/1.1\r\nHost: h\r\nContent-Type: text/plain\r\nContent-Length: %d\r\nX-Own: 1\r\n\r\n"
BODY = b"GET / HTTP/1.1\r\n\r\n{}"
SENT = b"POST /generate?a=1 HTTP/1.1\r\nhost: h\r\ncontent-type: text/plain\r\nx-own: 1\r\ncontent-length: %d\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nserver: uvicorn\r\ncontent-length: 12\r\nx-more: 2\r\n\r\nhello\r\n\r\nyou"
BY_SECOND = ANSWER.replace(b"\r\n\r\nhello", b"\r\nx-miles-engine: 127.0.0.2:9\r\n\r\nhello")
PASSED = BY_SECOND.replace(b"127.0.0.2", b"127.0.0.1")
"""What the client gets of an answer: the router says whose it is."""
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
        self.config = Config(self.app, http=BoundedProtocol, lifespan="off", proxy_headers=False, log_config=None)
        self.config.load()
        self.client, self.to_client = self.accept()
        self.upstream = []
        for number in range(engines):
            worker = self.app.registry.add(f"http://127.0.0.{number + 1}:9")
            self.upstream.append(connection := UpstreamConnection(worker.pool))
            connection.connection_made(Wire())
            worker.pool.put(connection)

    def accept(self):
        client, wire = BoundedProtocol(config=self.config, server_state=ServerState(), app_state={}), Wire()
        client.connection_made(wire)
        return client, wire

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
    assert [place for place in places if _exchange([place], [ANSWER]) != PASSED] == []


def test_wherever_an_answer_is_cut_the_client_gets_the_same_bytes():
    places = range(len(ANSWER))
    assert [place for place in places if _exchange([], _cut(ANSWER, [place])) != PASSED] == []


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
        assert r.to_client.data == PASSED * 2

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
        assert r.to_client.data == b"".join(PASSED.replace(b"you", b"yo%d" % number) for number in range(5))
        assert not r.to_client.paused

    asyncio.run(main())


def test_a_second_answer_reaches_nobody():
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x")
        await r.answers([ANSWER + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison"])
        assert r.to_client.data == PASSED
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
        assert r.to_client.data == (PASSED if first else BY_SECOND)
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


def test_who_reads_no_answers_gets_no_more_of_them_and_then_all():
    async def main():
        r = Between()
        r.client.data_received(b"".join(HEAD % 1 + b"%d" % number for number in range(3)))
        r.client.pause_writing()
        await r.answers([ANSWER])
        r.client.expire(r.client.loop.time() + 1000, 3600)
        assert r.written() == SENT % 1 + b"0"  # nor is the next one asked for
        assert r.to_client.paused
        assert not r.to_client.closed
        r.client.resume_writing()
        await r.gets((SENT % 1 + b"0") + (SENT % 1 + b"1"))
        await r.answers([ANSWER])
        await r.answers([ANSWER])
        assert r.to_client.data == PASSED * 3
        assert not r.to_client.paused

    asyncio.run(main())


def test_who_reads_no_answers_may_leave():
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x" + HEAD % 1 + b"y")
        r.client.pause_writing()
        await r.answers([ANSWER])
        r.client.connection_lost(None)
        assert r.written() == SENT % 1 + b"x"
        assert r.app.bodies.held == r.app.registry.healthy[0].outstanding == 0

    asyncio.run(main())


def test_a_request_that_nobody_serves_takes_nothing_from_the_head_that_came_with_it():
    async def main():
        r = Between()
        (worker,) = r.app.registry
        r.app.registry.healthy = []
        behind = HEAD.replace(b"X-Own: 1", b"X-Own: 1\r\nX-Miles-Weight-Version: 7") % 0
        r.client.data_received(HEAD % 1 + b"x" + behind[:40])
        while not r.to_client.data:
            await asyncio.sleep(0)
        assert Answer(r.to_client.data).status == 503
        r.app.registry.healthy = [worker]
        r.to_client.data = b""
        r.client.data_received(behind[40:])
        while not r.to_client.data:
            await asyncio.sleep(0)
        assert b"no_version" in r.to_client.data
        assert r.written() == b""

    asyncio.run(main())


def test_a_client_that_leaves_ends_its_request_though_another_waits_behind_it():
    async def main():
        r = Between(router_max_requests=10)
        r.client.data_received(HEAD % 1 + b"x" + HEAD % 1 + b"y")
        await r.gets(SENT % 1 + b"x")
        r.client.connection_lost(None)
        while not r.upstream[0]._transport.closed:
            await asyncio.sleep(0)
        while r.app.registry.healthy[0].outstanding:
            await asyncio.sleep(0)

    asyncio.run(main())


def test_a_connection_that_closes_is_not_held_open_by_who_reads_nothing(monkeypatch):
    async def main():
        r = Between()
        r.client.data_received(HEAD % 1 + b"x")
        r.upstream[0].data_received(ANSWER[:70])
        aborted = []
        monkeypatch.setattr(r.to_client, "get_write_buffer_size", lambda: 70)
        monkeypatch.setattr(r.to_client, "abort", lambda: aborted.append(True))
        r.upstream[0].connection_lost(None)
        assert r.to_client.closed
        now = r.client.loop.time()
        r.client.expire(now, 60)
        r.client.expire(now + 59, 60)
        assert not aborted
        r.client.expire(now + 61, 60)
        assert aborted

    asyncio.run(main())


_REQUESTS = [
    HEAD % 3 + b"abc", HEAD % 0, b"\r\n", b"GET /v1/other HTTP/1.1\r\nHost: h\r\n\r\n",
    HEAD.replace(b"X-Own: 1", b"Connection: close") % 1 + b"x", HEAD.replace(b"/generate", b"/nothing") % 1 + b"x",
    HEAD.replace(b"X-Own", b"X-Miles-Weight-Version") % 1 + b"x",
]  # fmt: skip
_OK = b"HTTP/1.1 200 OK\r\n"
_ANSWERS = [
    ANSWER, STREAM, ANSWER + ANSWER, b"HTTP/1.1 100 Continue\r\n\r\n" + ANSWER, b"HTTP/1.1 204 N\r\n\r\n",
    b"what?\r\n\r\n",
    _OK + b"\r\nuntil it closes", _OK + b"content-length: 5\r\nconnection: close\r\n\r\nhello",
    _OK + b"content-length: 500\r\n\r\nhello", _OK + b"content-length: 5\r\ncontent-length: 6\r\n\r\nhello",
    b"HTTP/1.1 304 N\r\ncontent-length: 7\r\n\r\n", b"HTTP/1.1 500 N\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
]  # fmt: skip


class Storm:
    """Whatever may happen to a router, in any order; what is random of it comes from a seed."""

    def __init__(self, seed, monkeypatch, limits):
        self.random = random.Random(seed)
        self.r = Between(engines=2, router_health_interval=1000, **limits)
        self.clients = [(self.r.client, self.r.to_client), *(self.r.accept() for _ in range(2))]
        self.sends = {client: b"".join(self.random.choices(_REQUESTS, k=6)) for client, _ in self.clients}
        self.engines = list(self.r.upstream)
        self.gone = set()
        monkeypatch.setattr(ConnectionPool, "connect", self.connect)

    def connect(self, *of):
        async def connecting(pool):
            await asyncio.sleep(0)
            if (luck := self.random.random()) < 0.3:
                raise ConnectError("refuses") if luck < 0.2 else LocalError("too many open files")
            connection = UpstreamConnection(pool)
            connection.connection_made(Wire())
            self.engines.append(connection)
            return connection

        return connecting(*of)

    def lose(self, connection, error=None):
        self.gone.add(connection)
        connection.connection_lost(error)

    def sweep(self):
        """Tell everybody whose transport was closed."""
        for client, wire in self.clients:
            if wire.closed and client not in self.gone:
                self.lose(client)
        for engine in self.engines:
            if engine._transport.closed and engine not in self.gone:
                self.lose(engine)

    def send(self, client, wire):
        if not wire.paused:
            size = self.random.choice([1, 5, 50, 120, 300])
            data, self.sends[client] = self.sends[client][:size], self.sends[client][size:]
            if data:
                client.data_received(data)

    def answer(self, engine):
        answer = self.random.choice(_ANSWERS)
        for piece in _cut(answer, self.random.choices(range(len(answer)), k=self.random.randrange(3))):
            if not engine._transport.closed:
                engine.data_received(piece)

    def fail_some(self):
        for connection in list(self.r.app._proxy.exchanges._of):
            if self.random.random() < 0.5:
                connection.fail(self.random.choice([SilentError, HungError])("says nothing"))

    def step(self):
        client, wire = self.random.choice([pair for pair in self.clients if pair[0] not in self.gone])
        engines = [engine for engine in self.engines if engine not in self.gone]
        readmit, alive = self.r.app.registry.readmit, client not in self.gone
        happens = self.random.choices(
            [
                lambda: self.send(client, wire),
                lambda: engines and self.answer(self.random.choice(engines)),
                lambda: engines and self.lose(self.random.choice(engines), self.random.choice([None, OSError()])),
                lambda: alive and self.lose(client),
                self.fail_some,
                client.pause_writing,
                client.resume_writing,
                client.shutdown,
                lambda: [readmit(worker) for worker in self.r.app.registry],
            ],
            [45, 35, 6, 2, 3, 2, 3, 1, 3],
        )
        happens[0]()

    async def run(self):
        for _ in range(80):
            if len(self.gone.intersection(client for client, _ in self.clients)) == len(self.clients):
                break
            self.step()
            for _ in range(self.random.randrange(4)):
                await asyncio.sleep(0)
            self.sweep()
        for client, wire in self.clients:
            if client not in self.gone:
                wire.closed = True
        for _ in range(300):
            self.sweep()
            await asyncio.sleep(0)


@pytest.mark.parametrize("limits", [{}, {"router_max_worker_requests": 1, "router_queue_size": 2}])
def test_whatever_happens_nothing_stays_counted_and_every_client_reads_answers_only(monkeypatch, limits):
    async def main(seed):
        storm = Storm(seed, monkeypatch, limits)
        await storm.run()
        app = storm.r.app
        assert not app._gate or (app._gate._active, len(app._gate)) == (0, 0), seed
        idle = {connection for worker in app.registry for connection in worker.pool._idle}
        assert (app.bodies.held, [worker.outstanding for worker in app.registry]) == (0, [0, 0]), seed
        assert not app._proxy.exchanges._of, seed
        assert not [connection for connection in idle if connection._busy or connection._transport.closed], seed
        asked = not any(worker.questioned for worker in app.registry)  # a probe has a connection of its own
        assert not asked or set(storm.engines) - storm.gone == idle, seed
        for _, wire in storm.clients:
            with contextlib.suppress(httptools.HttpParserUpgrade):
                httptools.HttpResponseParser(object()).feed_data(wire.data)
        await app.close()

    for seed in range(150):
        asyncio.run(main(seed))
