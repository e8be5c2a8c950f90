"""The client of the router: what nobody served is sent again, what was refused is not, and every wait ends."""

import asyncio
import json
import re
import socket

import pytest

from miles_api.errors import ServiceError
from miles_rollout.requests import Requests

PAYLOAD = {"input_ids": [3], "sampling_params": {"sampling_seed": 7}}


@pytest.fixture
def ask():
    """Post once to an engine; return the answer and how often it was sent again."""

    def post(url, timeout=20.0, meanwhile=None):
        async def main():
            requests = Requests(url, {}, timeout, 4)
            try:
                posted = asyncio.ensure_future(requests.post("/generate", PAYLOAD))
                if meanwhile is not None:
                    await meanwhile(requests)
                return await posted, requests.take_repeated()
            finally:
                await requests.close()

        return asyncio.run(main())

    return post


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_no_engine_served_is_sent_again_as_it_was(fake_engine, engine_reply, ask, status):
    answers = iter([(status, {"error": {"type": "worker_lost"}})] * 2 + [(200, engine_reply([5], "3"))])
    engine = fake_engine(lambda payload: next(answers))
    answer, repeated = ask(engine.url)
    assert answer == engine_reply([5], "3")
    assert repeated == 2
    assert engine.requests == [("/generate", PAYLOAD)] * 3


@pytest.mark.parametrize("status", [400, 404, 408, 413, 500])
def test_what_was_refused_is_not_sent_again(fake_engine, ask, status):
    engine = fake_engine(lambda payload: (status, {"error": "no"}))
    with pytest.raises(ServiceError, match=rf'/generate answered {status}: {{"error": "no"}}'):
        ask(engine.url)
    assert len(engine.requests) == 1


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("told", "shortest", "longest"),
    [("7", 7, 7), ("9999", 15, 20), ("Wed, 21 Oct 2015 07:28:00 GMT", 0, 1), ("nan", 0, 1), ("-5", 0, 1)],
)
def test_who_is_told_when_to_come_again_comes_then_but_not_after_the_deadline(
    fake_engine, engine_reply, ask, monkeypatch, status, told, shortest, longest
):
    pauses, sleep = [], asyncio.sleep

    async def noted(seconds):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", noted)
    answers = iter([(status, {"error": "later"}), (200, engine_reply([5], "3"))])

    def answer(payload):
        reply = next(answers)
        engine.headers = {"Retry-After": told} if reply[0] == status else {}
        return reply

    engine = fake_engine(answer)
    assert ask(engine.url)[1] == 1
    assert len([pause for pause in pauses if shortest <= pause <= longest]) == 1


def test_a_connection_that_closes_without_an_answer_is_no_answer(fake_engine, engine_reply, ask):
    seen = []

    def answer(payload):
        seen.append(payload)
        if len(seen) == 1:
            raise ConnectionAbortedError
        return 200, engine_reply([5], "3")

    assert ask(fake_engine(answer).url)[1] == 1


def test_half_an_answer_is_no_answer(ask):
    body = json.dumps({"text": "all of it"}).encode()

    async def serve(reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(re.search(rb"(?i)content-length: (\d+)", head)[1]))
        asked.append(head)
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(body))
        writer.write(body if len(asked) > 1 else body[:5])
        await writer.drain()
        writer.close()

    async def main():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            requests = Requests(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {}, 20.0, 4)
            try:
                return await requests.post("/generate", PAYLOAD)
            finally:
                await requests.close()

    asked = []
    assert asyncio.run(main()) == {"text": "all of it"}
    assert len(asked) == 2


def test_an_answer_that_is_no_json_is_shown_with_who_gave_it():
    async def serve(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\nconnection: close\r\n\r\n<p>Welcome</p>")
        writer.close()

    async def main():
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            requests = Requests(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", {}, 20.0, 4)
            try:
                await requests.post("/generate", PAYLOAD)
            finally:
                await requests.close()

    with pytest.raises(ServiceError, match=r"/generate answered with what is no JSON .*<p>Welcome</p>"):
        asyncio.run(main())


def test_a_port_where_nobody_listens_yet_is_asked_until_somebody_does(ask):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))

        async def serve(reader, writer):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}")
            writer.close()

        async def listen(requests):
            while not requests._repeated:
                await asyncio.sleep(0.01)
            await asyncio.start_server(serve, sock=sock)

        answer, repeated = ask(f"http://127.0.0.1:{sock.getsockname()[1]}", meanwhile=listen)
    assert answer == {}
    assert repeated >= 1


def test_when_the_time_is_up_the_error_says_what_was_tried_and_seen(fake_engine, ask):
    engine = fake_engine(lambda payload: (503, {"error": "no healthy worker"}))
    with pytest.raises(ServiceError) as caught:
        ask(engine.url, timeout=0.5)
    sent = len(engine.requests)
    assert sent > 1
    assert str(caught.value) == (
        f"{engine.url}/generate did not answer within --generate-timeout 0.5 s, though it was sent {sent} times; "
        'last seen: answered 503: {"error": "no healthy worker"}'
    )


def test_silence_is_not_answered_by_sending_again(ask):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(ServiceError, match=r"/generate did not answer within --generate-timeout 0\.3 s$"):
            ask(url, timeout=0.3)


@pytest.mark.parametrize("middleware", [None, ["a.middleware"]])
def test_samples_say_which_middleware_of_the_router_changed_their_tokens(
    worker, fake_engine, hook, tmp_path, middleware
):
    seen = tmp_path / "seen.json"
    body = "import json, pathlib\ndef fn(args, all_samples, data_source):\n"
    body += "    rows = [sample.metadata for group in all_samples for sample in group]\n"
    body += f"    pathlib.Path({str(seen)!r}).write_text(json.dumps(rows))\n"
    engine = fake_engine()
    flags = {"rm_type": "f1", "rollout_all_samples_process_path": hook(body)}
    rollouts = worker(engine, miles_router_middleware_paths=middleware, **flags)
    rollouts.generate(0, "1")
    assert json.loads(seen.read_text()) == [{}] * 6
    engine.headers["x-miles-changed-tokens"] = "prefix_tokens,caches/m%C3%A4ine.py:Cache"
    rollouts.generate(1, "1")
    assert json.loads(seen.read_text()) == [{"changed_tokens_by": ["prefix_tokens", "caches/mäine.py:Cache"]}] * 6
    assert (engine.joint > 0) == (middleware is None)


def test_samples_and_their_column_say_which_engine_answered(worker, fake_engine):
    engine = fake_engine()
    rollouts = worker(engine, rm_type="f1")
    assert "engines" not in rollouts.generate(0, "1")["batch"]
    engine.headers["x-miles-engine"] = "10.0.0.7:3000"
    assert rollouts.generate(1, "1")["batch"]["engines"] == [["10.0.0.7:3000"]] * 6
