"""Heads that are known by their bytes say what their parser says."""

from __future__ import annotations

import contextlib

import httptools
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_router.known_heads import KnownAnswers, KnownRequests, cut_head

HEAD = b"POST /generate HTTP/1.1\r\nHost: h\r\nContent-Length: %d\r\nX-Own: 1\r\n\r\n"


def _known():
    return KnownRequests(lambda path, _headers: bool(path), lambda _path: True)


_LINES = st.sampled_from([
    b"Content-Length: 5", b"content-length: 5", b"Content-Length: 05", b"CONTENT-LENGTH: 7", b"Content-Length:5",
    b"X: \r\nContent-Length: 3", b"X: Content-Length: 9", b" Content-Length: 8", b"Content-Length : 5", b"X: 1",
    b"Content-Length: +5", b"Content-Length: 5 ", b"Content-Length: 0x5", b"X\rContent-Length: 4", b"X: \x00", b"",
    b"Connection: keep-alive", b"Connection: upgrade", b"Connection: close", b"Upgrade: h2c", b"Host: h",
    b"Transfer-Encoding: chunked",
])  # fmt: skip


class Message:
    """What llhttp makes of a request or an answer."""

    def __init__(self, data, kind=httptools.HttpRequestParser):
        self.body, self.complete, self.headers = b"", 0, []
        with contextlib.suppress(httptools.HttpParserError, httptools.HttpParserUpgrade):
            kind(self).feed_data(data)

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
    known = _known()
    cut = cut_head(data)
    head = cut and known.find(cut[0], cut[1])
    if head:
        whole = data[: cut[3]] + b"b" * cut[2]
        parsed = Message(whole)
        assert (parsed.complete, parsed.body) == (1, b"b" * cut[2])
        assert [name for name, _ in parsed.headers].count(b"content-length") == 1
        again = Message(head.start + b"%d\r\n\r\n" % cut[2] + b"b" * cut[2])
        assert (again.complete, again.body) == (1, parsed.body)


@settings(max_examples=400, deadline=None)
@given(st.lists(_LINES, max_size=6))
def test_an_answers_head_that_is_passed_on_by_its_bytes_is_what_its_parser_says(lines):
    data = b"\r\n".join([b"HTTP/1.1 200 OK", *lines]) + b"\r\n\r\n"
    cut = cut_head(data)
    if cut and KnownAnswers().find(cut[0], cut[1]):
        got = Message(data[: cut[3]] + b"b" * cut[2], httptools.HttpResponseParser)
        assert (got.complete, got.body) == (1, b"b" * cut[2])
        assert not {name for name, _ in got.headers} & {b"connection", b"transfer-encoding", b"upgrade"}


def test_the_heads_that_are_remembered_are_bounded():
    known = _known()
    for number in range(5000):
        cut = cut_head(HEAD.replace(b"X-Own: 1", b"X-Own: %d" % number) % 5 + b"hello")
        assert known.find(cut[0], cut[1])
    assert len(known._known) <= 1024


@pytest.mark.parametrize(
    "target", [b"http://h:99999/generate", b"http://h:/generate", b"http://[::1/generate", b"http://@/", b"http://h"]
)
def test_a_target_that_is_no_url_is_left_to_the_parser(target):
    cut = cut_head(HEAD.replace(b"/generate", target) % 0)
    assert _known().find(cut[0], cut[1]) is None
