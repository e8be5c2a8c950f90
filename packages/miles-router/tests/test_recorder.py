"""What passes is written down, and answered again without an engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import stat
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.errors import DataError
from miles_router import RouterOptions, replay
from miles_router.middlewares.rate_limit import RateLimit
from miles_router.middlewares.recorder import Recorder
from miles_router.options import READY_PREFIX
from miles_router.protocol import BoundedProtocol
from miles_router.recording import Exchange, RecordingWriter, read_exchange, read_recording
from miles_router.replay import ReplayApp

CHUNKS = [b"data: 1\n\n", b"data: 2\n\n"]


async def counting(scope, receive, send):
    """Answer each request with how many there were; a request that asks for it gets a stream."""
    body = (await receive())["body"]
    counting.n += 1
    headers = [(b"x-mine", b"1"), (b"set-cookie", b"secret")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    for chunk in CHUNKS if b"stream" in body else [b"%d: %s" % (counting.n, body)]:
        await send({"type": "http.response.body", "body": chunk, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


@pytest.fixture
def record(serve, routed, tmp_path):
    """`record(requests, **options)` sends them one after the other and returns replies and counts."""
    path = tmp_path / "deep" / "recording"

    def run(requests, **options):
        counting.n = 0

        async def main():
            brought = {"recorder_path": str(path), **options}
            async with serve(counting) as url, routed(url, middleware=[Recorder], brought=brought) as r:
                replies = [await r.client.request(method, target, content=body) for method, target, body in requests]
                await r.stack.aclose()
                (row,) = (await r.client.get("/hooks")).json()["hooks"]
                return replies, row["counts"]

        return asyncio.run(main())

    run.path = path
    return run


@contextlib.asynccontextmanager
async def replaying(serve, path, **options):
    app = ReplayApp(RouterOptions(**options), str(path))
    await app.start()
    async with (
        serve(app, http=BoundedProtocol) as url,
        httpx.AsyncClient(base_url=url, trust_env=False, verify=False) as client,
    ):
        yield client
    await app.close()


POSTS = [("POST", "/generate", b"a"), ("POST", "/generate?x=1", b"a"), ("POST", "/generate", b"b"),
         ("POST", "/generate", b"a"), ("GET", "/model_info", b""), ("POST", "/v1/completions", b"stream")]  # fmt: skip


def test_the_nth_equal_request_gets_the_nth_recorded_answer(record, serve):
    replies, counts = record(POSTS)
    assert counts == {"recorded": 6, "dropped": 0, "waiting_bytes": 0}

    async def main():
        async with replaying(serve, record.path) as client:
            # another order: what counts is how often the very same was asked before
            order = [2, 5, 0, 3, 1, 4]
            again = {i: await client.request(POSTS[i][0], POSTS[i][1], content=POSTS[i][2]) for i in order}
            for i, reply in enumerate(replies):
                assert (again[i].status_code, again[i].content) == (200, reply.content)
                assert again[i].headers["x-mine"] == "1"
                assert "set-cookie" not in again[i].headers
            assert (await client.get("/health")).json()["recorded"] == 6

    asyncio.run(main())


def test_a_replay_makes_nothing_up_and_names_the_nearest(record, serve):
    record([("POST", "/generate", b'{"text": "one"}'), ("POST", "/generate", b'{"text": "two", "n": 1}')])

    async def main():
        async with replaying(serve, record.path) as client:
            assert (await client.post("/generate", content=b'{"text": "one"}')).status_code == 200
            once_more = await client.post("/generate", content=b'{"text": "one"}')
            assert once_more.status_code == 409
            assert "was recorded 1 time, this is one more" in once_more.text
            missed = await client.post("/generate", content=b'{"text": "two", "n": 2}')
            assert missed.status_code == 404
            message = missed.json()["error"]["message"]
            assert "nearest of 2 there is the 2., equal up to byte 21" in message
            assert '"n": 1}' in message
            assert '"n": 2}' in message
            other = await client.post("/v1/completions", content=b"x")
            assert other.status_code == 404
            assert "nor any other body there; recorded: POST /generate" in other.text
            assert (await client.post("/pause_generation")).status_code == 404

    asyncio.run(main())


def test_a_replay_answers_from_its_file_whoever_registers_an_engine_there(record, serve, engine):
    record([("POST", "/generate", b"a")])

    async def main():
        target = engine()
        async with serve(target) as url, replaying(serve, record.path) as client:
            await client.post("/workers", json={"url": url})
            assert [(await client.post("/generate", content=b"a")).status_code for _ in range(2)] == [200, 409]
        assert target.requests == []

    asyncio.run(main())


def test_a_missed_request_is_compared_with_so_many_others_at_most(record, serve, monkeypatch):
    record([("POST", "/generate", b"%d is asked" % n) for n in range(13)])
    read = []
    monkeypatch.setattr(replay, "_COMPARED", 10)
    monkeypatch.setattr(replay, "read_exchange", lambda *where: read.append(where) or read_exchange(*where))

    async def main():
        async with replaying(serve, record.path) as client:
            missed = await client.post("/generate", content=b"7 is told")
            assert "nearest of the first 10 of 13 there is the 8., equal up to byte 5" in missed.text

    asyncio.run(main())
    assert len(read) == 10


@given(st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=40))
def test_where_two_bodies_begin_to_differ_is_found(start, a, b):
    a, b = start + a, start + b
    assert replay._common(a, b) == len(os.path.commonprefix([a, b]))


def test_a_replay_wants_its_token_and_refuses_long_bodies(record, serve):
    record([("POST", "/generate", b"a")])

    async def main():
        options = {"router_token": "s3cret", "router_max_body_bytes": 10}
        async with replaying(serve, record.path, **options) as client:
            assert (await client.post("/generate", content=b"a")).status_code == 401
            headers = {"authorization": "Bearer s3cret"}
            assert (await client.post("/generate", content=b"a" * 11, headers=headers)).status_code == 413
            assert (await client.post("/generate", content=b"a", headers=headers)).content == b"1: a"

    asyncio.run(main())


def test_what_would_take_too_much_memory_is_dropped_and_counted_and_the_answer_comes(record):
    replies, counts = record([("POST", "/generate", b"x" * size) for size in (10, 5000, 10)], recorder_max_bytes=4000)
    assert [len(reply.content) for reply in replies] == [13, 5003, 13]
    assert (counts["recorded"], counts["dropped"]) == (2, 1)
    assert [exchange.request for _, _, exchange in read_recording(str(record.path))] == [b"x" * 10] * 2


def test_a_full_disk_is_counted_and_the_recording_stays_whole(record, monkeypatch):
    real = RecordingWriter.__init__

    class Full:
        """A file whose disk takes twenty bytes of the second record, and the third again."""

        def __init__(self, file):
            self.file, self.writes = file, 0

        def write(self, data):
            self.writes += 1
            return self.file.write(data[:20] if self.writes == 2 else data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    def opened(self, path):
        real(self, path)
        self._file = Full(self._file)

    monkeypatch.setattr(RecordingWriter, "__init__", opened)
    replies, counts = record([("POST", "/generate", bytes([n])) for n in range(3)])
    assert [reply.status_code for reply in replies] == [200] * 3
    assert (counts["recorded"], counts["dropped"]) == (2, 1)
    assert [exchange.request for _, _, exchange in read_recording(str(record.path))] == [b"\0", b"\2"]


def test_a_recording_is_continued_behind_what_a_crash_left(record):
    record(POSTS[:2])
    with record.path.open("r+b") as file:
        file.truncate(record.path.stat().st_size - 3)
    record.path.chmod(0o644)
    record(POSTS[2:4])
    assert [exchange.request for _, _, exchange in read_recording(str(record.path))] == [b"a", b"b", b"a"]
    assert stat.S_IMODE(record.path.stat().st_mode) == 0o600


def test_a_file_that_is_no_recording_is_neither_read_nor_overwritten(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"some": "thing of the user"}')
    with pytest.raises(DataError, match="no recording: it looks like JSON"):
        RecordingWriter(str(file))
    with pytest.raises(DataError, match="no recording"):
        ReplayApp(RouterOptions(), str(file))
    assert file.read_text() == '{"some": "thing of the user"}'
    with pytest.raises(DataError, match=r"cannot be read: No such file"):
        ReplayApp(RouterOptions(), str(tmp_path / "none"))


def test_an_answer_that_was_cut_off_is_marked_and_not_replayed(serve, routed, tmp_path):
    path = str(tmp_path / "recording")

    async def cut(scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"half", "more_body": True})

    async def main():
        async with serve(cut) as url, routed(url, middleware=[Recorder], brought={"recorder_path": path}) as r:
            with pytest.raises(httpx.HTTPError):
                await r.post(content=b"x")
            await r.stack.aclose()

    asyncio.run(main())
    ((_, _, exchange),) = read_recording(path)
    assert (exchange.pieces, exchange.complete) == ([b"half"], False)
    assert ReplayApp(RouterOptions(), path).recorded == 0


def test_a_request_that_was_refused_unread_is_not_replayed_as_an_empty_one(serve, routed, tmp_path):
    path = str(tmp_path / "recording")
    brought = {"recorder_path": path, "rate_limit_burst": 1, "rate_limit_per_second": 0.001}

    async def main():
        async with serve(counting) as url, routed(url, middleware=[Recorder, RateLimit], brought=brought) as r:
            assert [(await r.post(content=b"x")).status_code for _ in range(2)] == [200, 429]
            await r.stack.aclose()

    counting.n = 0
    asyncio.run(main())
    rows = [(exchange.request, exchange.status, exchange.complete) for _, _, exchange in read_recording(path)]
    assert rows == [(b"x", 200, True), (b"", 429, False)]
    assert ReplayApp(RouterOptions(), path).recorded == 1


def test_the_command_replays_a_file(tmp_path):
    path = tmp_path / "recording"
    writer = RecordingWriter(str(path))
    writer.write(Exchange(0.0, 0.1, "POST", b"/generate", b"{}", 200, [(b"content-length", b"4")], [b"do", b"ne"]))
    writer.close()
    words = [sys.executable, "-m", "miles_router", "--replay", str(path), "--parent-pid", str(os.getpid())]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=Path.cwd()) as process:
        try:
            url = process.stdout.readline().strip().removeprefix(READY_PREFIX)
            reply = httpx.post(f"{url}/generate", content=b"{}", trust_env=False)
            assert (reply.status_code, reply.content) == (200, b"done")
        finally:
            process.terminate()
    both = subprocess.run([*words, "--worker", "http://127.0.0.1:1"], capture_output=True, text=True, check=False)
    assert "--replay answers by itself" in both.stderr
    assert both.returncode == 2
