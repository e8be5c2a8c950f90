"""What passes through the router, and how."""

from __future__ import annotations

import asyncio
import contextlib
import os

import pytest


async def _read_request(reader):
    """Return the head and body of one request, or None at the end of the connection."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError:
        return None
    length = next((int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")), 0)
    return head, await reader.readexactly(length)


async def _raw(port, data):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    return reader, writer


def test_a_request_reaches_the_engine_byte_for_byte(serve, routed, engine):
    async def main():
        target = engine()
        body = b'{"input_ids":[1, 2],  "a key of tomorrow": {"\xc3\xa9": 1e400}, "rid" : "x"}'
        async with serve(target) as url, routed(url) as r:
            headers = {"x-own": "Yes; a=1", "content-type": "application/json"}
            await r.post("/generate?n=%201&n=2", content=body, headers=headers)
        scope, got = target.requests[0]
        assert got == body
        assert (scope["method"], scope["raw_path"], scope["query_string"]) == ("POST", b"/generate", b"n=%201&n=2")
        assert dict(scope["headers"])[b"x-own"] == b"Yes; a=1"
        assert dict(scope["headers"])[b"host"] == r.url.removeprefix("http://").encode()

    asyncio.run(main())


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(
    "path",
    [
        "/update_weights_from_disk",
        "/pause_generation",
        "/flush_cache",
        "/release_memory_occupation",
        "/init_weights_update_group",
        "/weights_checker",
        "/of_tomorrow",
        "/generate/",
        "/v1",
        "/v1/../flush_cache",
        "/v1/%2e%2e/flush_cache",
        "/v1%2f..%2fflush_cache",
    ],
)
def test_what_is_no_inference_never_reaches_an_engine(serve, routed, engine, method, path):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            request = f"{method} {path} HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
            reader, writer = await _raw(r.port, request.encode())  # unlike httpx, this does not resolve dots
            answer = await reader.read()
            writer.close()
        assert answer.startswith(b"HTTP/1.1 404 ")
        assert b"called on the engines directly" in answer
        assert target.requests == []

    asyncio.run(main())


def test_inference_and_information_reach_the_engine_by_their_own_methods_only(serve, routed, engine):
    posts = ["/generate", "/encode", "/classify", "/rerank", "/tokenize", "/detokenize"]
    gets = ["/get_model_info", "/server_info", "/get_server_info", "/health_generate"]
    v1 = ["/v1/models", "/v1/chat/completions"]

    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            for method, good, bad in (("POST", posts, gets), ("GET", gets, posts), ("PUT", [], posts + gets + v1)):
                for path in good + v1 if method != "PUT" else []:
                    assert (await r.client.request(method, path)).status_code == 200
                for path in bad:
                    assert (await r.client.request(method, path)).status_code == 405
            assert (await r.client.get("/model_info")).json()["model_path"] == "m"
        assert len(target.requests) == len(posts) + len(gets) + 2 * len(v1)

    asyncio.run(main())


def test_an_escaped_path_is_not_decoded_on_the_way(serve, routed, engine):
    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            await r.post("/v1/a%2Fb%20c")
        assert target.requests[0][0]["raw_path"] == b"/v1/a%2Fb%20c"

    asyncio.run(main())


@pytest.mark.parametrize("path", ["/generate", "/v1/a%2Fb"])
def test_an_answer_says_which_engine_it_is_from_and_no_engine_speaks_for_another(serve, routed, engine, path):
    """On the short way and on the one through the application, for which a path with an escape is."""

    async def main():
        liar = engine(b"2", 200, [(b"x-miles-engine", b"somebody:else"), (b"x-own", b"1")])
        async with serve(engine(b"1")) as first, serve(liar) as second, routed(first, second) as r:
            answers = [await r.post(path, json={}) for _ in range(12)]
        said = {(answer.content, *answer.headers.get_list("x-miles-engine")) for answer in answers}
        urls = (first, second)
        assert said == {(b"%d" % (i + 1), url.removeprefix("http://")) for i, url in enumerate(urls)}

    asyncio.run(main())


def test_status_headers_and_body_come_back_untouched(serve, routed, engine):
    async def main():
        headers = [(b"x-weights", b"7"), (b"set-cookie", b"a=1"), (b"set-cookie", b"b=2"), (b"server", b"sgl")]
        async with serve(engine(b"\x00\xff no json", 422, headers)) as url, routed(url) as r:
            answer = await r.post()
        assert (answer.status_code, answer.content) == (422, b"\x00\xff no json")
        assert answer.headers.get_list("set-cookie") == ["a=1", "b=2"]
        assert answer.headers["x-weights"] == "7"
        assert "connection" not in answer.headers

    asyncio.run(main())


def test_large_binary_bodies_pass_both_ways(serve, routed, engine):
    async def main():
        up, down = os.urandom(3_000_001), os.urandom(5_000_003)
        target = engine(down)
        async with serve(target) as url, routed(url) as r:
            answer = await r.post("/v1/embeddings", content=up)
        assert target.requests[0][1] == up
        assert answer.content == down

    asyncio.run(main())


def test_a_client_that_reads_slowly_holds_the_engine_back_and_still_gets_everything(listen, routed):
    size, sent = 64 << 20, 0

    async def big(reader, writer):
        nonlocal sent
        await _read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % size)
        while sent < size:
            writer.write(bytes(1 << 16))
            sent += 1 << 16
            await writer.drain()

    async def main():
        async with listen(big) as url, routed(url) as r:
            reader, writer = await _raw(r.port, b"GET /v1/big HTTP/1.1\r\nhost: h\r\n\r\n")
            await reader.readuntil(b"\r\n\r\n")
            await asyncio.sleep(0.5)
            held = sent
            got = 0
            while got < size:
                got += len(await reader.read(1 << 20))
            writer.close()
        assert held < size / 2
        assert got == size

    asyncio.run(main())


def test_a_chunked_upload_arrives_whole(serve, routed, engine):
    async def parts():
        for part in (b"one ", b"two ", b"three"):
            yield part

    async def main():
        target = engine()
        async with serve(target) as url, routed(url) as r:
            await r.post(content=parts())
        scope, body = target.requests[0]
        assert body == b"one two three"
        assert dict(scope["headers"])[b"content-length"] == b"13"

    asyncio.run(main())


def test_headers_of_one_hop_stay_on_that_hop(serve, routed, engine):
    async def main():
        target = engine(headers=[(b"connection", b"x-hop"), (b"x-hop", b"1"), (b"keep-alive", b"timeout=1")])
        async with serve(target) as url, routed(url) as r:
            headers = {"connection": "keep-alive, X-Secret", "x-secret": "1", "te": "trailers", "x-kept": "1"}
            answer = await r.post(headers=headers)
        names = dict(target.requests[0][0]["headers"])
        assert b"x-kept" in names
        assert not {b"x-secret", b"te", b"connection"} & set(names)
        assert not {"x-hop", "keep-alive", "connection"} & set(answer.headers)

    asyncio.run(main())


def test_events_arrive_one_by_one_before_the_engine_ends(listen, routed):
    proceed = asyncio.Event()

    async def stream(reader, writer):
        await _read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        for index in range(3):
            event = b"data: %d\n\n" % index
            writer.write(b"%x\r\n%s\r\n" % (len(event), event))
            await proceed.wait()
            proceed.clear()
        writer.write(b"0\r\n\r\n")
        await reader.read()

    async def main():
        async with listen(stream) as url, routed(url) as r, r.client.stream("POST", "/generate") as answer:
            events = answer.aiter_raw()
            for index in range(3):
                assert await anext(events) == b"data: %d\n\n" % index
                proceed.set()  # the engine writes the next event only now
            assert [event async for event in events] == []

    asyncio.run(main())


def test_an_answer_that_ends_with_the_connection_is_complete(listen, routed):
    async def until_close(reader, writer):
        await _read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\nall of it")

    async def main():
        async with listen(until_close) as url, routed(url) as r:
            assert (await r.post()).content == b"all of it"

    asyncio.run(main())


@pytest.mark.parametrize(
    "head", [b"content-length: 100\r\n\r\nonly this", b"transfer-encoding: chunked\r\n\r\n9\r\nonly this\r\n"]
)
def test_an_answer_that_breaks_off_looks_broken_to_the_client(listen, routed, head):
    async def broken(reader, writer):
        await _read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\n" + head)

    async def main():
        async with listen(broken) as url, routed(url) as r:
            reader, writer = await _raw(r.port, b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
            answer = await reader.read()
            writer.close()
        assert b"only this" in answer
        assert not answer.endswith(b"0\r\n\r\n")

    asyncio.run(main())


def test_a_head_request_gets_headers_and_no_body(listen, routed):
    async def headers_only(reader, writer):
        while await _read_request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")

    async def main():
        async with listen(headers_only) as url, routed(url) as r:
            for _ in range(2):
                answer = await r.client.head("/v1/models")
                assert (answer.status_code, answer.headers["content-length"], answer.content) == (200, "1000", b"")

    asyncio.run(main())


def test_an_informational_answer_is_not_taken_for_the_answer(listen, routed):
    async def hints(reader, writer):
        await _read_request(reader)
        writer.write(b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\nhi")
        await reader.read()

    async def main():
        async with listen(hints) as url, routed(url) as r:
            answer = await r.post()
        assert (answer.status_code, answer.content, "link" in answer.headers) == (201, b"hi", False)

    asyncio.run(main())


def test_connections_to_the_engine_are_kept_and_reused(listen, routed):
    connections = 0

    async def keep(reader, writer):
        nonlocal connections
        connections += 1
        while await _read_request(reader):
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")

    async def main():
        async with listen(keep) as url, routed(url) as r:
            for _ in range(5):
                assert (await r.post(content=b"x")).text == "ok"
        assert connections == 1

    asyncio.run(main())


def test_an_answer_nobody_asked_for_never_reaches_the_next_client(listen, routed):
    async def double(reader, writer):
        while request := await _read_request(reader):
            mine = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(request[1]), request[1])
            writer.write(mine + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison")

    async def main():
        async with listen(double) as url, routed(url) as r:
            for text in ("first", "second", "third"):
                assert (await r.post(content=text.encode())).text == text

    asyncio.run(main())


def test_what_an_engine_sends_on_an_idle_connection_never_reaches_the_next_client(listen, routed):
    async def main():
        dropped = asyncio.Event()

        async def babbles(reader, writer):
            await _read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
            await asyncio.sleep(0.05)
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 600\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await reader.read()
            dropped.set()

        async with listen(babbles) as url, routed(url) as r:
            assert (await r.post()).text == "ok"
            await asyncio.wait_for(dropped.wait(), 10)
            assert (await r.post()).text == "ok"

    asyncio.run(main())


def test_an_engine_that_answers_before_it_read_the_request_gets_the_next_one_on_a_new_connection(listen, routed):
    connections = 0

    async def too_large(reader, writer):
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await asyncio.sleep(60)

    async def main():
        async with listen(too_large) as url, routed(url) as r:
            for _ in range(2):
                assert (await r.post(content=bytes(32 << 20))).status_code == 413
        assert connections == 2

    asyncio.run(main())


@pytest.mark.parametrize("started", [False, True])
def test_a_client_that_leaves_ends_the_request_at_the_engine(listen, routed, started):
    async def main():
        asked, left = asyncio.Event(), asyncio.Event()

        async def endless(reader, writer):
            await _read_request(reader)
            if started:
                writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhi\r\n")
            asked.set()
            await reader.read()  # returns when the router closes
            left.set()

        async with listen(endless) as url, routed(url) as r:
            reader, writer = await _raw(r.port, b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
            await asked.wait()
            if started:
                await reader.readuntil(b"hi")
            assert (await r.workers())[0]["outstanding"] == 1
            writer.close()
            await asyncio.wait_for(left.wait(), 10)
            await r.until(lambda row: row["outstanding"] == 0)
            assert (await r.workers())[0]["healthy"]

    asyncio.run(main())
