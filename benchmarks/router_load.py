"""An open loop for benchmarks/router.py: requests leave at a constant rate, whatever becomes of those before.

    python router_load.py URL BODY_FILE RATE SECONDS CONNECTIONS

Prints one JSON object. A request's latency counts from the time it was meant to leave, so that a stall shows in all
that were due meanwhile (no coordinated omission); `lag_p99` is by how much this client itself woke up too late.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections import Counter, deque
from pathlib import Path

import uvloop

_TICK_S = 0.001  # the resolution of uvloop's timers
_HEAD_END = b"\r\n\r\n"
_LENGTH = b"content-length: "


class Connection(asyncio.Protocol):
    """A keep-alive connection with one request at a time."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._data = b""
        self._due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._load.free.append(self)

    def ask(self, due: float) -> None:
        self._due = due
        self._transport.write(self._load.request)

    def data_received(self, data: bytes) -> None:
        data = self._data + data if self._data else data
        end = data.find(_HEAD_END)
        head = data[: end + 2].lower() if end > 0 else b""
        at = head.find(_LENGTH)
        if at < 0 or len(data) < end + 4 + int(head[at + len(_LENGTH) : head.find(b"\r", at)]):
            self._data = data
            return
        self._data = b""
        self._load.answered(int(data[9:12]), self._due)
        self._load.free.append(self)

    def connection_lost(self, _error: Exception | None) -> None:
        self._load.lost += 1


class Load:
    """Requests at `rate` a second; who finds no free connection waits, which its latency contains."""

    def __init__(self, request: bytes, rate: float) -> None:
        self.request = request
        self.free: deque[Connection] = deque()
        self.lost = 0
        self._rate = rate
        self._latencies: dict[int, list[float]] = {}
        self._lags: list[float] = []

    def answered(self, status: int, due: float) -> None:
        self._latencies.setdefault(status, []).append(time.perf_counter() - due)

    async def run(self, seconds: float) -> dict[str, object]:
        """Send for so long, and wait for what is under way, for five seconds at most."""
        start, sent, total = time.perf_counter(), 0, int(self._rate * seconds)
        end = start + seconds + 5
        cpu, awake = time.process_time(), start
        while sum(map(len, self._latencies.values())) < total and (now := time.perf_counter()) < end:
            self._lags.append(max(now - awake - _TICK_S, 0.0))
            due = min(int((now - start) * self._rate), total)
            while sent < due and self.free:
                intended = start + sent / self._rate
                self.free.popleft().ask(intended)
                sent += 1
            awake = time.perf_counter()
            await asyncio.sleep(_TICK_S)
        good = sorted(self._latencies.get(200, []))
        return {
            "rate": len(good) / seconds,
            "p50": 1e3 * _at(good, 0.5),
            "p99": 1e3 * _at(good, 0.99),
            "lag_p99": 1e3 * _at(sorted(self._lags), 0.99),
            "statuses": dict(Counter({status: len(all_) for status, all_ in self._latencies.items()})),
            "unanswered": total - sum(map(len, self._latencies.values())),
            "lost": self.lost,
            "client_us": 1e6 * (time.process_time() - cpu) / max(sent, 1),
        }


def _at(ordered: list[float], share: float) -> float:
    return ordered[int(share * (len(ordered) - 1))] if ordered else float("nan")


async def _main(url: str, body: bytes, rate: float, seconds: float, connections: int) -> dict[str, object]:
    host, _, port = url.removeprefix("http://").partition(":")
    head = "POST /generate HTTP/1.1\r\nHost: {}:{}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"
    load = Load(head.format(host, port, len(body)).encode() + body, rate)
    loop = asyncio.get_running_loop()
    for _ in range(connections):
        await loop.create_connection(lambda: Connection(load), host, int(port))
    gc.freeze()
    gc.disable()
    return await load.run(seconds)


if __name__ == "__main__":
    uvloop.install()
    given = sys.argv[1:]
    text = Path(given[1]).read_bytes()
    print(json.dumps(asyncio.run(_main(given[0], text, float(given[2]), float(given[3]), int(given[4])))))
