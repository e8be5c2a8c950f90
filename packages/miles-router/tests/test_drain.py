"""How a router process ends: nothing new is taken, what is under way may finish, and not for ever."""

from __future__ import annotations

import asyncio
import signal

import pytest

from miles_api.services import Endpoint
from miles_router import Router, RouterOptions
from miles_router.options import short_flag


async def _running(options, url):
    router = Router(options)
    base = await asyncio.to_thread(router.start)
    await asyncio.to_thread(router.register, Endpoint(url=url))
    return router, int(base.rpartition(":")[2])


async def _ask(port):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"POST /generate HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize("finishes", [True, False])
def test_a_stopped_router_lets_requests_end_within_the_drain_timeout(serve, engine, finishes):
    async def main():
        target = engine(b"in the end")
        target.gate = asyncio.Event()
        async with serve(target) as url:
            router, port = await _running(RouterOptions(router_drain_timeout=30 if finishes else 0.2), url)
            try:
                reader, _open = await _ask(port)
                idle, _too = await asyncio.open_connection("127.0.0.1", port)
                while not target.requests:
                    await asyncio.sleep(0.01)
                router._process.send_signal(signal.SIGTERM)
                assert await asyncio.wait_for(idle.read(), 20) == b""  # it has begun to stop
                await asyncio.sleep(0.5)  # longer than it takes without requests
                if finishes:
                    target.gate.set()
                answer = await asyncio.wait_for(reader.read(), 20)
                assert answer.endswith(b"in the end") is finishes
                assert finishes or not answer
                await asyncio.wait_for(asyncio.to_thread(router._process.wait), 20)
            finally:
                await asyncio.to_thread(router.stop)

    asyncio.run(main())


def test_a_runs_router_gets_all_its_options():
    options = RouterOptions(router_policy="sticky", router_queue_size=7, router_drain_timeout=1.5, router_token="t")
    line = Router(options)._command_line(9)
    assert {"--policy=sticky", "--queue-size=7", "--drain-timeout=1.5", "--fd=9"} <= set(line)
    given = {part.partition("=")[0] for part in line}
    unset = {short_flag(field) for field in RouterOptions.__struct_fields__} - given
    assert unset == {"--port", "--token"}  # the child inherits the socket, and the token comes by the environment
