"""Many clients at once, and an engine that dies meanwhile: everybody gets the answer to their own request.

`MILES_STRESS_REQUESTS=100000` asks for more than the few thousand of an ordinary run, `MILES_OVERLOAD_SECONDS=60` for a
longer overload than three seconds.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter

import httpx
import pytest

from miles_api.services import Endpoint
from miles_router import Router, RouterOptions

REQUESTS = int(os.environ.get("MILES_STRESS_REQUESTS", "4000"))
CONNECTIONS = 512

ENGINE = """
import asyncio, random

class Engine(asyncio.Protocol):
    def connection_made(self, transport):
        self.transport, self.data = transport, b""

    def data_received(self, data):
        self.data += data
        head, end, body = self.data.partition(b"\\r\\n\\r\\n")
        size = int(head.lower().partition(b"content-length:")[2].split(b"\\r\\n")[0] or 0)
        if not end or len(body) < size:
            return
        self.data = b""
        name = body[:12]
        answer = name + name * random.randrange(1, 400) + name
        lines = b"HTTP/1.1 200 OK\\r\\ncontent-length: %d\\r\\nx-name: %s\\r\\n\\r\\n" % (len(answer), name)
        # sometimes late, sometimes in two parts, so that answers overlap in every order
        cut = random.choice([0, 0, len(answer) // 2])
        first, rest = (lines + answer[:cut], answer[cut:]) if cut else (b"", lines + answer)
        if first:
            self.transport.write(first)
        asyncio.get_running_loop().call_later(random.random() * 0.01, self.transport.write, rest)

async def main():
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""


class Client:
    """One keep-alive connection after the other; what was cut off is asked again."""

    def __init__(self, url, numbers, on_answer):
        self.address = url.removeprefix("http://").split(":")
        self.numbers, self.on_answer = numbers, on_answer
        self.cut = self.opened = 0
        self.wrong = []

    async def run(self):
        connection = None
        for number in self.numbers:
            name = b"%012d" % number
            while True:
                connection = connection or await self.connect()
                try:
                    status, named, body = await self.ask(*connection, name)
                except (asyncio.IncompleteReadError, ConnectionError):
                    self.cut += 1
                    connection[1].close()
                    connection = None
                    continue
                if status != 200 or named != name or body != name * (len(body) // 12) or len(body) % 12:
                    self.wrong.append((name, status, named, body[:60]))
                self.on_answer()
                break
        connection[1].close()

    async def connect(self):
        self.opened += 1
        return await asyncio.open_connection(*self.address)

    async def ask(self, reader, writer, name):
        body = name + b"x" * random.randrange(3000)
        writer.write(b"POST /generate HTTP/1.1\r\nhost: r\r\ncontent-length: %d\r\n\r\n%s" % (len(body), body))
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        headers = dict(line.split(b": ", 1) for line in head.split(b"\r\n")[1:-2])
        return int(head.split()[1]), headers.get(b"x-name"), await reader.readexactly(int(headers[b"content-length"]))


@pytest.fixture
def engines():
    processes = [subprocess.Popen([sys.executable, "-c", ENGINE], stdout=subprocess.PIPE) for _ in range(3)]
    yield [(process, f"http://127.0.0.1:{int(process.stdout.readline())}") for process in processes]
    for process in processes:
        process.kill()
        process.communicate()


@pytest.mark.timeout(900)
def test_every_answer_is_that_of_its_own_request_though_an_engine_dies_meanwhile(engines):
    answered = 0

    def on_answer():
        nonlocal answered
        answered += 1
        if answered == REQUESTS // 3:
            engines[0][0].kill()

    async def main(url):
        clients = [Client(url, range(first, REQUESTS, CONNECTIONS), on_answer) for first in range(CONNECTIONS)]
        await asyncio.gather(*(client.run() for client in clients))
        async with httpx.AsyncClient(trust_env=False, verify=False) as client:
            return clients, (await client.get(f"{url}/workers")).json()["workers"]

    router = Router(RouterOptions(router_health_interval=30.0))
    url = router.start()
    try:
        for _, engine in engines:
            router.register(Endpoint(url=engine, weight_version="1"))
        clients, workers = asyncio.run(main(url))
    finally:
        router.stop()
    assert [wrong for client in clients for wrong in client.wrong] == []
    assert answered == REQUESTS
    # kept alive: a connection is opened anew only where an answer was cut off in its middle
    assert sum(client.opened - client.cut for client in clients) == CONNECTIONS
    assert [worker["healthy"] for worker in workers] == [False, True, True]


OVERLOAD_S = float(os.environ.get("MILES_OVERLOAD_SECONDS", "3"))
EACH, QUEUE = 8, 32


class Slow:
    """An engine that takes its time for each request and notes how many it has at once."""

    def __init__(self):
        self.running = self.most = self.served = 0

    async def __call__(self, scope, receive, send):
        name = (await receive())["body"][:12]
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(0.05)
        self.running -= 1
        self.served += 1
        head = [(b"content-length", b"12"), (b"x-name", name)]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        await send({"type": "http.response.body", "body": name})


class Pressing(Client):
    """A client that asks again at once when it was served, and a little later when it was refused."""

    def __init__(self, url, first, until, answers):
        super().__init__(url, (), None)
        self.first, self.until, self.answers = first, until, answers

    async def run(self):
        connection = await self.connect()
        number = self.first
        while asyncio.get_running_loop().time() < self.until:
            name = b"%012d" % number
            status, named, body = await self.ask(*connection, name)
            served = status == 200
            assert (named, body) == (name, name) if served else b'"queue_full"' in body
            self.answers[status] += 1
            number += 1
            await asyncio.sleep(0 if served else 0.05)
        connection[1].close()


@pytest.mark.timeout(900)
def test_with_twice_as_many_clients_as_places_everybody_gets_an_answer_and_then_all_is_as_before(serve):
    answers = Counter()

    async def main():
        engines = [Slow(), Slow()]
        async with serve(engines[0]) as a, serve(engines[1]) as b:
            router = Router(RouterOptions(router_max_worker_requests=EACH, router_queue_size=QUEUE))
            url = await asyncio.to_thread(router.start)
            try:
                for engine in (a, b):
                    await asyncio.to_thread(router.register, Endpoint(url=engine))
                until, places = asyncio.get_running_loop().time() + OVERLOAD_S, 2 * EACH + QUEUE
                clients = [Pressing(url, 10_000_000 * first, until, answers) for first in range(2 * places)]
                await asyncio.wait_for(asyncio.gather(*(client.run() for client in clients)), OVERLOAD_S + 60)
                async with httpx.AsyncClient(trust_env=False, verify=False) as client:
                    return engines, (await client.get(f"{url}/status")).json()
            finally:
                await asyncio.to_thread(router.stop)

    engines, after = asyncio.run(main())
    assert set(answers) == {200, 503}
    assert answers[200] == sum(engine.served for engine in engines)
    assert [engine.most for engine in engines] == [EACH, EACH]
    assert (after["queued"], [row["outstanding"] for row in after["workers"]]) == (0, [0, 0])
    assert all(row["healthy"] for row in after["workers"])
