"""The router's own questions to an engine: small requests on connections of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .errors import LostError

if TYPE_CHECKING:
    from .connection import UpstreamConnection
    from .workers import Worker

__all__ = ["PROBE_AGENT", "fetch"]

PROBE_AGENT = b"miles-router"
"""The `User-Agent` of these requests, so that an engine's log tells them from those of clients."""

_MAX_BYTES = 16 << 20


async def fetch(
    worker: Worker, path: str, *headers: tuple[bytes, bytes], body: bytes | None = None
) -> tuple[int, bytes]:
    """Return status and body of `GET path`, or of a POST of `body`, which is JSON.

    The caller sets the deadline. Raises `UpstreamError`.
    """
    if body is not None:
        headers += ((b"content-type", b"application/json"), (b"content-length", b"%d" % len(body)))
    connection: UpstreamConnection = await worker.pool.connect()
    try:
        extra = b"".join((worker.key_line, *(b"%s: %s\r\n" % pair for pair in headers)))
        connection.begin(
            b"%s %s HTTP/1.1\r\nhost: %s\r\nuser-agent: %s\r\nconnection: close\r\n%s\r\n"
            % (b"GET" if body is None else b"POST", path.encode(), worker.host, PROBE_AGENT, extra),
            body or b"",
            head_only=False,
        )
        await connection.wait_answer()
        answer, more = b"", True
        while more:
            await connection.wait_more()
            data, more = connection.take()
            answer += data
            if len(answer) > _MAX_BYTES:
                raise LostError(f"answers {path} with more than {_MAX_BYTES} bytes")
        return connection.status, answer
    finally:
        connection.finish()
