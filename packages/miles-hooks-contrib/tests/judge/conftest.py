"""A judge behind HTTP: a real local server that answers, refuses, hangs, breaks off and babbles."""

import asyncio
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from miles_api.testing import hook_args, make_sample

MARKED = re.compile(r"----- (\w+) -----")


class Judge:
    """A server whose answers are functions of its handler, one for each request; the last one stays."""

    def __init__(self):
        self.answers, self.requests, self.headers = [], [], []
        self.most_at_once, self._at_once = 0, 0
        self._lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                self.body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer = judge.next_answer(self)
                try:
                    answer(self)
                except ConnectionError:
                    self.close_connection = True
                finally:
                    judge.left()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        # A client that hung up is no news.
        self.server.handle_error = lambda request, address: None
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True, kwargs={"poll_interval": 0.01}).start()

    def next_answer(self, handler):
        with self._lock:
            self.requests.append(handler.body)
            self.headers.append((handler.path, dict(handler.headers)))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]

    def left(self):
        with self._lock:
            self._at_once -= 1


def send(handler, status, body, **headers):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": str(len(data)), **headers}.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(data)


def completion(text, finish_reason="stop"):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}]}


def says(text, **more):
    """Answer with a text; MARK in it is the mark of the question."""

    def answer(handler):
        mark = MARKED.search(handler.body["messages"][1]["content"])
        send(handler, 200, completion(text.replace("MARK", mark[1] if mark else ""), **more))

    return answer


def fails(status, body=b"{}", **headers):
    return lambda handler: send(handler, status, body, **headers)


def breaks_off(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def never_answers(handler):
    handler.rfile.read(1)  # until the other side hangs up


@pytest.fixture
def judge():
    made = Judge()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def ask(judge):
    """Score samples at the same time, and close the hook as a run does."""

    from miles_hooks_contrib.llm_judge import LlmJudge  # needs aiohttp, without which its tests are skipped

    def asked(*samples, answers=(), **options):
        judge.answers = list(answers) or [says("MARK verdict: 5")]
        hook = LlmJudge(hook_args(LlmJudge, judge_url=judge.url, judge_model="referee", **options))

        async def score():
            try:
                return await asyncio.gather(*(hook(hook_args(), sample) for sample in samples or [make_sample()]))
            finally:
                await hook.aclose()

        return asyncio.run(score())

    return asked
