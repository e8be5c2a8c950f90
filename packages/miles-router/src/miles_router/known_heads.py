"""Heads that came before need no second parsing: what differs between two of them is mostly the content-length.

A head without these digits is the key. It is learnt from llhttp (strict), with `0` in their place: whatever it makes of
that head it makes of the same bytes with other digits, as long as they stand in the only content-length. What is no
such head, not whole, or unfit to be passed on as it is, is left to the parsers of its connection.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

import httptools

from .heads import BODILESS, NOT_RETURNED, request_head

if TYPE_CHECKING:
    from collections.abc import Callable

    Headers = list[tuple[bytes, bytes]]

__all__ = ["KnownAnswers", "KnownRequests", "RequestHead", "cut_head"]

_MAX_HEAD = 8 << 10
_MAX_DIGITS = 12
_MAX_KNOWN = 1024
"""Heads remembered, at most 8 MB; when they are more, all are forgotten, and those in use come back at once."""
_NO_BODY = b"0\r\n\r\n"
_LENGTHS = (b"\r\nContent-Length: ", b"\r\ncontent-length: ")
_LENGTH_SIZE = len(_LENGTHS[0])
_PLAIN_ANSWER = re.compile(
    rb"HTTP/1\.1 [2-5][0-9][0-9] [\x20-\x7e]*(?:\r\n[!#$%&'*+.^_`|~0-9A-Za-z-]+:[^\x00-\x08\x0a-\x1f\x7f]*)+"
)


def cut_head(data: bytes) -> tuple[bytes, int, int, int] | None:
    """Return the key of the head that `data` begins with, where in it the digits stood, their number, the body's begin.

    None if the head is not whole, longer than 8 KB, or has no plain content-length.
    """
    end = data.find(b"\r\n\r\n", 0, _MAX_HEAD)
    at = data.find(_LENGTHS[0], 0, end)
    if at < 0:
        at = data.find(_LENGTHS[1], 0, end)
        if at < 0:
            return None
    if end < 0:
        return None
    start = at + _LENGTH_SIZE
    stop = data.find(b"\r\n", start)
    digits = data[start:stop]
    if not digits.isdigit() or stop - start > _MAX_DIGITS:
        return None
    return data[:start] + data[stop:end], start, int(digits), end + 4


class RequestHead(NamedTuple):
    """A request's head as engines get it, but for the digits of the content-length and what follows them."""

    start: bytes
    headers: Headers
    generates: bool
    """Whether an engine has to work for the answer."""


class KnownRequests:
    """The heads of POST requests to paths, with headers, that `admit` lets through.

    An engine does not work for what `generates` denies.
    """

    def __init__(self, admit: Callable[[str, Headers], bool], generates: Callable[[str], bool]) -> None:
        self._admit = admit
        self._generates = generates
        self._known: dict[bytes, RequestHead | None] = {}

    def find(self, key: bytes, digits_at: int) -> RequestHead | None:
        """Return what becomes of a head; None if it is to be parsed."""
        try:
            return self._known[key]
        except KeyError:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = self._learn(key, digits_at)
            return found

    def _learn(self, key: bytes, digits_at: int) -> RequestHead | None:
        seen = _Parsed(httptools.HttpRequestParser, key, digits_at)
        names = {name for name, _ in seen.headers}
        if not seen.plain or seen.parser.get_method() != b"POST" or b"expect" in names or b"host" not in names:
            return None
        try:
            url = httptools.parse_url(seen.url)
        except httptools.HttpParserInvalidURLError:
            return None
        path = (url.path or b"").decode("ascii")  # llhttp lets no other bytes into a target
        if not path or "%" in path or not self._admit(path, seen.headers):
            return None
        scope = {"method": "POST", "raw_path": url.path, "query_string": url.query or b"", "headers": seen.headers}
        head = request_head(scope, b"", 0)
        return RequestHead(head.removesuffix(_NO_BODY), seen.headers, self._generates(path))


class KnownAnswers:
    """The heads of answers that may reach the client byte for byte, and the status of each."""

    def __init__(self) -> None:
        self._known: dict[bytes, int] = {}

    def find(self, key: bytes, digits_at: int) -> int:
        """Return the status of an answer; 0 if it is to be parsed."""
        try:
            return self._known[key]
        except KeyError:
            if len(self._known) >= _MAX_KNOWN:
                self._known.clear()
            found = self._known[key] = self._learn(key, digits_at)
            return found

    def _learn(self, key: bytes, digits_at: int) -> int:
        if not _PLAIN_ANSWER.fullmatch(key[:digits_at] + b"0" + key[digits_at:]):
            return 0
        seen = _Parsed(httptools.HttpResponseParser, key, digits_at)
        if not seen.plain or any(name in NOT_RETURNED for name, _ in seen.headers):
            return 0
        status = seen.parser.get_status_code()
        return 0 if status in BODILESS else status


class _Parsed:
    """What llhttp makes of a head with the content-length 0, in a parser of its own."""

    def __init__(self, kind: Callable[[_Parsed], Any], key: bytes, digits_at: int) -> None:
        self.headers: Headers = []
        """Names in lower case."""
        self.url = b""
        self.plain = False
        """Whether it is a whole message of HTTP/1.1 that keeps its connection, framed by one content-length alone."""
        self.parser = kind(self)
        try:
            self.parser.feed_data(key[:digits_at] + b"0" + key[digits_at:] + b"\r\n\r\n")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.plain = False

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_message_complete(self) -> None:
        framing = [pair for pair in self.headers if pair[0] in (b"content-length", b"transfer-encoding")]
        kept = self.parser.get_http_version() == "1.1" and self.parser.should_keep_alive()
        self.plain = bool(kept) and framing == [(b"content-length", b"0")]
