"""`--rm-type remote_rm` against a bare aiohttp POST of the same JSON, 64 requests at a time, taking turns."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import aiohttp
import uvloop

from miles_api.config import RunConfig, option_groups
from miles_api.sample import Sample
from miles_rollout.rewards import reward
from miles_rollout.rewards.remote import close_remote

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

Scorer = Callable[[Sample], Awaitable[Any]]

ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 3\r\n\r\n0.5"


class Answers(asyncio.Protocol):
    """The least that a server can do: it finds the end of each request and answers 0.5."""

    def connection_made(self, transport: Any) -> None:
        self.transport, self.rest = transport, b""

    def data_received(self, data: bytes) -> None:
        self.rest += data
        while (end := self.rest.find(b"\r\n\r\n")) >= 0:
            size = int(self.rest[:end].lower().split(b"content-length:")[1].split(b"\r\n")[0])
            if len(self.rest) < end + 4 + size:
                return
            self.rest = self.rest[end + 4 + size :]
            self.transport.write(ANSWER)


def serve(pipe: Connection) -> None:
    async def run() -> None:
        server = await asyncio.get_running_loop().create_server(Answers, "127.0.0.1", 0)
        pipe.send(server.sockets[0].getsockname()[1])
        await asyncio.Event().wait()

    uvloop.run(run())


def contestants(url: str, concurrency: int, session: aiohttp.ClientSession) -> dict[str, Scorer]:
    config = RunConfig({name: kind() for name, kind in option_groups().items()}, {})
    args = config.replace("bench", rm_type="remote_rm", rm_url=url, rm_concurrency=concurrency).args

    async def post(connections: aiohttp.ClientSession, sample: Sample) -> Any:
        body = {"prompt": sample.prompt, "response": sample.response, "label": sample.label}
        async with connections.post(url, json=body) as reply:
            reply.raise_for_status()
            return await reply.json()

    async def ours(sample: Sample) -> Any:
        return await reward(args, sample)

    async def bare(sample: Sample) -> Any:
        return await post(session, sample)

    async def anew(sample: Sample) -> Any:
        async with aiohttp.ClientSession() as own:
            return await post(own, sample)

    return {"bare aiohttp": bare, "remote_rm": ours, "a session for each request": anew}


async def crowd(score: Scorer, samples: list[Sample], concurrency: int) -> None:
    queue = iter(samples)

    async def work() -> None:
        for sample in queue:
            assert await score(sample) == 0.5  # noqa: PLR2004  what the server says

    await asyncio.gather(*(work() for _ in range(concurrency)))


async def measure(url: str, options: argparse.Namespace) -> None:
    samples = [Sample(index=i, prompt="p" * 1000, response="r" * 4000, label="42") for i in range(options.samples)]
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=options.concurrency)) as session:
        ways = contestants(url, options.concurrency, session)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(options.rounds + 1):
            for name in list(ways) if turn % 2 else list(ways)[::-1]:
                cpu, wall = time.process_time(), time.perf_counter()
                await crowd(ways[name], samples, options.concurrency)
                seconds[name].append((time.process_time() - cpu, time.perf_counter() - wall))
    await close_remote()
    _show({name: turns[1:] for name, turns in seconds.items()}, options.samples)


def _show(seconds: dict[str, list[tuple[float, float]]], samples: int) -> None:
    base = next(iter(seconds.values()))
    for name, turns in seconds.items():
        for place, what in enumerate(("CPU", "wall")):
            ratios = sorted(mine[place] / other[place] for mine, other in zip(turns, base, strict=True))
            middle = statistics.median(turn[place] for turn in turns)
            low, ratio, high = ratios[0], statistics.median(ratios), ratios[-1]
            print(f"{name:28} {what:5} {1e6 * middle / samples:5.0f} us, {ratio:.2f} of bare ({low:.2f} to {high:.2f})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--concurrency", type=int, default=64)
    options = parser.parse_args()
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.Process(target=serve, args=(theirs,), daemon=True)
    server.start()
    try:
        uvloop.run(measure(f"http://127.0.0.1:{ours.recv()}/score", options))
    finally:
        server.kill()


if __name__ == "__main__":
    main()
