"""Many clients at once, and an engine that dies meanwhile: everybody gets the answer to their own request.

`MILES_STRESS_REQUESTS=100000` asks for more than the few thousand of an ordinary run.
"""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys

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
