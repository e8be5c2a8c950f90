"""Where Search-R1 finds its passages: BM25 over a file, and a retrieval server over real connections."""

import asyncio
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest

from miles_api.cli.main import main
from miles_api.errors import ConfigError, DataError, ServiceError
from miles_api.testing import hook_args
from miles_hooks_contrib.search_r1 import SearchR1

aiohttp = pytest.importorskip("aiohttp")
pytest.importorskip("bm25s")

from miles_hooks_contrib.search_r1.bm25 import Bm25  # noqa: E402  they need what may be missing
from miles_hooks_contrib.search_r1.remote import Remote  # noqa: E402

LINES = [
    {"id": "1", "contents": "Moon\nThe moon is made of cheese."},
    {"id": 2, "title": "Sun", "text": "A star, hot and far."},
    {"text": "Cheese is made of milk; cheese keeps."},
    {"id": "4", "title": "Item 7", "text": "code x"},
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in LINES) + "\n\n")
    return file


@contextlib.contextmanager
def served(*words, **variables):
    """Run `miles retrieval-server` on a free port; give its address."""
    command = [sys.executable, "-m", "miles_api.cli", "retrieval-server", *map(str, words), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **variables}) as process:
        try:
            line = process.stdout.readline()
            yield re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/retrieve)\n", line)[1]
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0


@pytest.fixture(scope="module")
def address(corpus):
    with served(corpus, "--topk", "2") as url:
        yield url


def posted(url, body, **headers):
    """POST as Search-R1's own client does; return status and body."""
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers}
    )  # fmt: skip
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def searched(url, query, topk=3, token=None, timeout=5.0):
    async def ask():
        remote = Remote(url, token, timeout)
        try:
            return await remote.search(query, topk)
        finally:
            await remote.aclose()

    return asyncio.run(ask())


@contextlib.contextmanager
def answering(*replies):
    """A server in this process that gives one reply after the other, the last one for ever; gives address and count."""
    loop, seen = asyncio.new_event_loop(), []

    async def handle(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            head = await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head.lower())[1]))
            status, body = replies[min(len(seen), len(replies) - 1)]
            seen.append(head)
            if status:
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
                await writer.drain()
            elif status is None:
                await asyncio.sleep(60)
            writer.close()

    server = loop.run_until_complete(asyncio.start_server(handle, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/retrieve", seen
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        server.close()
        open_ones = asyncio.all_tasks(loop)
        for task in open_ones:
            task.cancel()
        if open_ones:
            loop.run_until_complete(asyncio.wait(open_ones))
        loop.close()


def test_bm25_finds_passages_with_a_word_of_the_query_best_first_and_none_without(corpus):
    index = Bm25(str(corpus))
    assert [hit.document.contents for hit in index.find("What is cheese made of?", 3)] == [
        "\nCheese is made of milk; cheese keeps.",
        "Moon\nThe moon is made of cheese.",
    ]
    assert [hit.document.id for hit in index.find("item 7", 1)] == ["4"]
    assert [hit.document.id for hit in index.find("STAR", 9)] == [2]
    assert index.find("volcano", 3) == []
    assert index.find("", 3) == []
    assert index.find("of the", 3) == []


def test_of_passages_that_fit_alike_the_first_of_the_file_are_found(tmp_path):
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"id": number, "contents": f"moon {number}"}) + "\n" for number in range(50)))
    index = Bm25(str(file))
    for topk in (1, 3, 60):
        assert [hit.document.id for hit in index.find("moon", topk)] == list(range(50))[:topk]
    assert [hit.document.id for hit in index.find("moon 7", 3)] == [7, 0, 1]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "holds no passage"),
        ('{"contents": "a"}\n{"title": "b"}', "line 2 has neither `contents` nor `text`"),
        ('{"contents": "a"}\n\nnonsense', "line 3: "),
        ('{"contents": 3}', r"line 1: .*`\$\.contents`"),
    ],
)
def test_a_corpus_that_cannot_be_read_is_refused_with_its_line(tmp_path, text, problem):
    file = tmp_path / "bad.jsonl"
    file.write_text(text)
    with pytest.raises(DataError, match=problem):
        SearchR1(hook_args(SearchR1, search_corpus=str(file)))


def test_the_server_speaks_the_published_form(address):
    asked = {"queries": ["cheese milk", "volcano"], "topk": 1, "return_scores": True}
    status, answer = posted(address, asked)
    [[hit], none] = answer["result"]
    assert (status, none) == (200, [])
    assert hit["document"] == {"contents": "\nCheese is made of milk; cheese keeps."}
    assert hit["score"] > 0
    status, answer = posted(address, {"queries": ["cheese"]})
    assert [len(documents) for documents in answer["result"]] == [2], "--topk counts where the query names none"
    assert answer["result"][0][1] == {"contents": "Moon\nThe moon is made of cheese.", "id": "1"}


@pytest.mark.parametrize("body", [{"topk": 3}, {"queries": "moon"}, [], {"queries": ["a"], "topk": 0}])
def test_the_server_says_what_is_wrong_with_a_request(address, body):
    status, answer = posted(address, body)
    assert status == 400
    assert "queries" in answer["detail"] or "topk is 0" in answer["detail"]


def test_a_request_deeper_than_a_parser_goes_is_refused(address):
    deep = b'{"queries": ["a"], "more": ' + b"[" * 50_000
    request = urllib.request.Request(address, deep)
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=20)
    assert refused.value.code == 400


def test_a_remote_search_finds_what_the_server_has(address):
    assert [hit.document.id for hit in searched(address, "moon")] == ["1"]
    assert searched(address, "volcano") == []


def test_each_event_loop_searches_over_connections_of_its_own(address):
    remote = Remote(address, None, 5.0)
    found = [asyncio.run(remote.search("moon", 1)) for _ in range(2)]
    assert [hit.document.id for [hit] in found] == ["1", "1"]


def test_a_server_with_a_token_answers_nobody_without_it(corpus):
    with served(corpus, MILES_RETRIEVAL_TOKEN="ünlock") as url:
        assert posted(url, {"queries": ["moon"]})[0] == 401
        assert [hit.document.id for hit in searched(url, "moon", token="ünlock")] == ["1"]
        with pytest.raises(ServiceError, match=r"answered 401: .*bearer token"):
            searched(url, "moon", token="wrong")


def test_the_server_is_not_open_to_other_machines_without_a_token(corpus, capsys, monkeypatch):
    monkeypatch.delenv("MILES_RETRIEVAL_TOKEN", raising=False)
    assert main(["retrieval-server", str(corpus), "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 lets other machines search the corpus: pass --token" in capsys.readouterr().err


GOOD = (200, '{"result": [[{"document": {"id": "1", "contents": "Moon", "more": 1}, "score": 2}]]}')


@pytest.mark.parametrize("first", [(503, "loading"), (429, "slowly"), (0, "")])
def test_what_a_server_could_not_serve_is_asked_again(first):
    with answering(first, GOOD) as (url, seen):
        assert [hit.document.contents for hit in searched(url, "moon")] == ["Moon"]
        assert len(seen) == 2


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((404, "no such page"), "answered 404: no such page"),
        ((302, ""), "answered 302"),
        ((200, "hello"), "answered in another form .*: hello"),
        ((200, '{"result": []}'), "answered in another form"),
        ((200, '{"result": [["Moon"]]}'), "answered in another form"),
    ],
)
def test_what_a_server_refuses_or_garbles_is_an_error_at_once(reply, problem):
    with answering(reply) as (url, seen), pytest.raises(ServiceError, match=problem):
        searched(url, "moon")
    assert len(seen) == 1


@pytest.mark.parametrize(("reply", "last"), [((500, "down"), "it answered 500: down"), ((None, ""), "did not answer")])
def test_a_server_that_stays_out_of_reach_is_an_error_by_the_deadline(reply, last):
    with answering(reply) as (url, _), pytest.raises(ServiceError, match=rf"within --search-timeout 0\.4 s.*{last}"):
        searched(url, "moon", timeout=0.4)


def test_nobody_listening_is_an_error_that_names_the_address():
    with pytest.raises(ServiceError, match=r"--search-url http://127\.0\.0\.1:1/retrieve served no search within"):
        searched("http://127.0.0.1:1/retrieve", "moon", timeout=0.3)


def test_an_address_that_is_none_is_refused():
    with pytest.raises(ConfigError, match=r"--search-url localhost:8000: expected an address such as"):
        SearchR1(hook_args(SearchR1, search_url="localhost:8000"))
