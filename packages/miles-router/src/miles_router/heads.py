"""The heads of requests and answers as they are passed on: without what is meant for one hop only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import STATUS_LINE

if TYPE_CHECKING:
    from .connection import UpstreamConnection
    from .messages import Message, Scope

__all__ = ["BODILESS", "ENGINE", "NOT_FORWARDED", "NOT_RETURNED", "client_head", "request_head", "response_start"]

# `expect` is not hop-by-hop, but the server in front has answered it and the body is here
_ONE_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization proxy-connection te trailer trailers "
    b"transfer-encoding upgrade content-length expect".split()
)
NOT_FORWARDED = _ONE_HOP | {b"authorization"}
"""Names of headers that do not reach an engine: what a client shows is for the router, and each engine has a key."""
ENGINE = b"x-miles-engine"
"""The response header that says which engine answered, `host:port`."""
NOT_RETURNED = _ONE_HOP - {b"content-length", b"expect"} | {ENGINE}
"""Names of headers that do not reach a client; no engine speaks for another."""
BODILESS = frozenset((204, 304))
_NONE: frozenset[bytes] = frozenset()
_CONNECTION_LENGTH = len(b"connection")
_PLAIN_CONNECTION = frozenset((b"keep-alive", b"close", b"Keep-Alive", b"Close"))


def _nominated(headers: list[tuple[bytes, bytes]]) -> frozenset[bytes]:
    """Return the headers that `Connection` declares to be for this hop only; usually none, which costs next to none."""
    for name, value in headers:
        if len(name) == _CONNECTION_LENGTH and value not in _PLAIN_CONNECTION and name.lower() == b"connection":
            values = b",".join(value.lower() for name, value in headers if name.lower() == b"connection")
            return frozenset(token.strip() for token in values.split(b",")) - {b"host", b"content-length"}
    return _NONE


def request_head(scope: Scope, host: bytes, length: int, key_line: bytes = b"") -> bytes:
    """Return the head of the request to an engine, for a body of `length` bytes, with the line that shows its key."""
    headers: list[tuple[bytes, bytes]] = scope["headers"]
    parts = [scope["method"].encode(), b" ", scope["raw_path"]]
    if scope["query_string"]:
        parts += (b"?", scope["query_string"])
    parts.append(b" HTTP/1.1\r\n")
    nominated = _nominated(headers)
    dropped = NOT_FORWARDED | nominated if nominated else NOT_FORWARDED
    framed = length > 0
    hosted = False
    for name, value in headers:
        if name in dropped:
            framed = framed or name in (b"content-length", b"transfer-encoding")
            continue
        if name == b"host":
            hosted = True
        parts += (name, b": ", value, b"\r\n")
    if not hosted:
        parts += (b"host: ", host, b"\r\n")
    parts.append(key_line)
    if framed:
        parts.append(b"content-length: %d\r\n" % length)
    parts.append(b"\r\n")
    return b"".join(parts)


def response_start(connection: UpstreamConnection) -> Message:
    """Return the ASGI message that begins the client's answer."""
    return {"type": "http.response.start", "status": connection.status, "headers": _returned(connection)}


def client_head(connection: UpstreamConnection, *, keep_alive: bool) -> tuple[bytes, bool]:
    """Return the head of the client's answer, and whether its body has to be chunked; the method is not HEAD."""
    headers = _returned(connection)
    parts = [STATUS_LINE[connection.status]]
    for name, value in headers:
        parts += (name, b": ", value, b"\r\n")
    chunked = connection.status not in BODILESS and all(name.lower() != b"content-length" for name, _ in headers)
    if chunked:
        parts.append(b"transfer-encoding: chunked\r\n")
    if not keep_alive:
        parts.append(b"connection: close\r\n")
    parts.append(b"\r\n")
    return b"".join(parts), chunked


def _returned(connection: UpstreamConnection) -> list[tuple[bytes, bytes]]:
    nominated = _nominated(connection.headers)
    dropped = NOT_RETURNED | nominated if nominated else NOT_RETURNED
    if connection.status in BODILESS:  # whose length is that of a body which is not there
        dropped |= {b"content-length"}
    return [*(pair for pair in connection.headers if pair[0].lower() not in dropped), (ENGINE, connection.pool.name)]
