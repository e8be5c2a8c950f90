"""The engine of benchmarks/router.py: reads a request, answers, decodes nothing; one uvloop process on a free port.

A POST to `/generate` is answered with as many bytes as it has; with `"stream": true` near its beginning, in 16 events.
The argument, if any, is how many seconds an answer that is no stream takes.
"""

from __future__ import annotations

import asyncio
import sys
from typing import Any

import uvloop

EVENTS = 16
_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length:"
_INFO = b'{"model_path": "stub", "status": "ready", "weight_version": "1", "data": [], "dp_size": 1}'
_EVENT = b'data: {"text": "' + b"x" * 80 + b'", "meta_info": {"id": "1"}}\n\n'


def _json(body: bytes) -> bytes:
    kind = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return kind % len(body) + body


def _answer_of(size: int) -> bytes:
    """Return an answer whose body has about `size` bytes."""
    start, end = (
        b'{"text": "',
        b'", "meta_info": {"id": "1", "finish_reason": {"type": "stop"}, "weight_version": "1"}}',
    )
    return _json(start + b"x" * max(size - len(start) - len(end), 0) + end)


class Worker(asyncio.Protocol):
    """One connection; a request at a time, as HTTP/1.1 clients send them."""

    answers: dict[int, bytes] = {}
    seconds = 0.0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._data = bytearray()

    def data_received(self, data: bytes) -> None:
        self._data += data
        end = self._data.find(_HEAD_END)
        if end < 0:
            return
        size = _length(bytes(self._data[:end]).lower())
        begin = end + len(_HEAD_END)
        if len(self._data) < begin + size:
            return
        streaming = self._data.find(b'"stream": true', begin, begin + 200) >= 0
        posted = self._data.startswith(b"POST")
        self._data.clear()
        if streaming:
            self._stream()
        elif posted:
            answer = self.answers.get(size) or self.answers.setdefault(size, _answer_of(size))
            if self.seconds:
                asyncio.get_running_loop().call_later(self.seconds, self._transport.write, answer)
            else:
                self._transport.write(answer)
        else:
            self._transport.write(_json(_INFO))

    def _stream(self) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-accel-buffering: no\r\n"  # nginx passes events on
            b"transfer-encoding: chunked\r\n\r\n"
        )
        asyncio.get_running_loop().call_soon(self._event, EVENTS)

    def _event(self, left: int) -> None:
        if self._transport.is_closing():
            return
        if not left:
            self._transport.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
            return
        self._transport.write(b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT))
        asyncio.get_running_loop().call_soon(self._event, left - 1)


def _length(head: bytes) -> int:
    at = head.find(_LENGTH)
    return int(head[at + len(_LENGTH) :].split(b"\r\n", 1)[0]) if at >= 0 else 0


async def _main() -> None:
    server = await asyncio.get_running_loop().create_server(Worker, "127.0.0.1", 0, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.install()
    Worker.seconds = float(sys.argv[1]) if sys.argv[1:] else 0.0
    sys.exit(asyncio.run(_main()))
