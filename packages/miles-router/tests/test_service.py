"""The router as a child process: start, register, stop, and every way it can fail to."""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import http.client
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from importlib import metadata
from pathlib import Path

import pytest

from miles_api.addresses import is_loopback
from miles_api.config import RunConfig
from miles_api.errors import ConfigError, ServiceError
from miles_api.services import Endpoint, RouterService
from miles_router import Router, RouterOptions, service
from miles_router.command import command
from miles_router.options import READY_PREFIX
from miles_router.service import create


def _get(url, path, headers=None):
    host, port = url.removeprefix("http://").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=10)
    try:
        connection.request("GET", path, headers=headers or {})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # an orphan stays a zombie where process 1 does not reap
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def test_the_service_starts_routes_and_leaves_no_process(serve, engine):
    async def main():
        router = Router(RouterOptions())
        assert isinstance(router, RouterService)
        url = await asyncio.to_thread(router.start)
        pid = router._process.pid
        try:
            async with serve(engine(b"hello")) as backend:
                endpoint = Endpoint(url=backend, weight_version="3")
                await asyncio.to_thread(router.register, endpoint)
                assert await asyncio.to_thread(_get, url, "/v1/anything") == (200, b"hello")
                assert b'"weight_version":"3"' in (await asyncio.to_thread(_get, url, "/workers"))[1]
                for _ in range(2):  # an engine that is unknown by now is no error
                    await asyncio.to_thread(router.unregister, endpoint)
                assert (await asyncio.to_thread(_get, url, "/v1/anything"))[0] == 503
        finally:
            await asyncio.to_thread(router.stop)
        router.stop()
        assert not _alive(pid)
        with pytest.raises(OSError, match="refused"):
            _get(url, "/health")

    asyncio.run(main())


def test_a_port_in_use_names_the_flag_and_the_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        router = Router(RouterOptions(sglang_router_port=port))
        with pytest.raises(ServiceError, match=rf"--sglang-router-port {port} is taken"):
            router.start()
    assert router._process is None


def test_an_address_of_another_machine_names_the_flag():
    router = Router(RouterOptions(sglang_router_ip="192.0.2.1", router_token="t"))
    with pytest.raises(ServiceError, match=r"--sglang-router-ip 192\.0\.2\.1 is not an address of this machine"):
        router.start()


def test_a_refused_registration_says_why():
    router = Router(RouterOptions())
    router.start()
    try:
        with pytest.raises(ServiceError, match="not of the form http://host:port"):
            router.register(Endpoint(url="https://engine"))
        with pytest.raises(ServiceError, match="already started"):
            router.start()
    finally:
        router.stop()


def test_a_router_that_died_says_so_when_called():
    router = Router(RouterOptions())
    router.start()
    router._process.kill()
    router._process.wait()
    assert router.dead().startswith("the router (pid ")
    with pytest.raises(ServiceError, match="died with exit code -9"):
        router.register(Endpoint(url="http://127.0.0.1:1"))
    router.stop()
    with pytest.raises(ServiceError, match="was stopped"):
        router.register(Endpoint(url="http://127.0.0.1:1"))


def test_a_router_that_died_is_replaced_at_its_address_and_who_connects_meanwhile_waits_for_it():
    router = Router(RouterOptions())
    url = router.start()
    try:
        assert router.dead() == ""
        router._process.kill()
        router._process.wait()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            early = pool.submit(_get, url, "/health")
            router.restart()
            assert early.result(20)[0] == 200
        assert router.dead() == ""
        router.register(Endpoint(url="http://127.0.0.1:1", weight_version="3"))
        assert b'"weight_version":"3"' in _get(url, "/workers")[1]
    finally:
        router.stop()
    assert router.dead() == ""
    with pytest.raises(ServiceError, match="was stopped"):
        router.restart()
    with pytest.raises(OSError, match="refused"):
        _get(url, "/health")


def test_a_router_that_was_never_started_says_so_when_called():
    with pytest.raises(ServiceError, match="not started"):
        Router(RouterOptions()).register(Endpoint(url="http://127.0.0.1:1"))


def _stop_while_starting(router, monkeypatch):
    """Call `stop` as soon as the child exists; return what `start` raised and the child's process id."""
    pids, raised = [], []

    def popen(*args, **kwargs):
        # a child that would never be ready
        process = start_child([sys.executable, "-c", "import time; time.sleep(600)"], **kwargs)
        pids.append(process.pid)
        return process

    def start():
        with pytest.raises(ServiceError) as caught:
            router.start()
        raised.append(str(caught.value))

    start_child = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    thread = threading.Thread(target=start, daemon=True)
    thread.start()
    while not pids:
        time.sleep(0.001)
    router.stop()
    thread.join(20)
    assert not thread.is_alive()
    return raised[0], pids


def test_stop_ends_a_start_that_is_under_way(monkeypatch):
    router = Router(RouterOptions())
    raised, pids = _stop_while_starting(router, monkeypatch)
    assert raised == "the router was stopped"
    assert not any(map(_alive, pids))
    assert len(pids) == 1


def test_stop_does_not_wait_for_a_helper_that_middleware_started_and_that_holds_its_output(tmp_path, monkeypatch):
    monkeypatch.setattr(service, "_LAST_WORDS_S", 0.1)
    (tmp_path / "own.py").write_text(
        "import pathlib, subprocess\n"
        "class Helped:\n"
        "    def __init__(self, app, *, router):\n"
        "        self._app, helper = app, subprocess.Popen(['sleep', '60'])\n"
        "        pathlib.Path(__file__).with_name('helper').write_text(str(helper.pid))\n"
        "    async def __call__(self, scope, receive, send):\n"
        "        await self._app(scope, receive, send)\n"
    )
    router = Router(RouterOptions(), [f"{tmp_path}/own.py:Helped"])
    router.start()
    stopping = threading.Thread(target=router.stop, daemon=True)
    try:
        stopping.start()
        stopping.join(20)
        assert not stopping.is_alive()
    finally:
        os.kill(int((tmp_path / "helper").read_text()), signal.SIGKILL)


def test_stop_is_final_so_that_a_late_start_leaves_no_child():
    router = Router(RouterOptions())
    router.stop()
    with pytest.raises(ServiceError, match="was stopped"):
        router.start()
    assert router._process is None


def test_the_token_reaches_the_child_but_not_its_command_line():
    router = Router(RouterOptions(router_token="s3cret"))
    url = router.start()
    try:
        assert "s3cret" not in Path(f"/proc/{router._process.pid}/cmdline").read_text()
        assert _get(url, "/workers")[0] == 401
        assert _get(url, "/workers", {"authorization": "Bearer s3cret"})[0] == 200
        router.register(Endpoint(url="http://127.0.0.1:1"))
    finally:
        router.stop()


def test_the_router_ends_with_its_parent():
    script = (
        "import os, threading\n"
        "from miles_router import Router, RouterOptions\n"
        "router = Router(RouterOptions())\n"
        "starter = threading.Thread(target=router.start); starter.start(); starter.join()\n"
        "print(router._process.pid, flush=True)\n"
        "input()\n"
        "os._exit(9)\n"
    )
    pipe = subprocess.PIPE
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command_line = [sys.executable, "-c", script]
    with subprocess.Popen(command_line, stdin=pipe, stdout=pipe, text=True, env=environment) as parent:
        pid = int(parent.stdout.readline())
        assert _alive(pid)  # although the thread that started it is gone
        parent.communicate("\n", timeout=20)
    deadline = time.monotonic() + 20
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "myhost"])
def test_listening_beyond_loopback_without_a_token_is_an_error(host):
    with pytest.raises(ConfigError, match="set --router-token"):
        Router(RouterOptions(sglang_router_ip=host))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_needs_no_token(host):
    assert is_loopback(host)
    Router(RouterOptions(sglang_router_ip=host))


def test_every_address_is_returned_as_one_that_can_be_connected():
    router = Router(RouterOptions(sglang_router_ip="0.0.0.0", router_token="t"))
    url = router.start()
    try:
        assert "0.0.0.0" not in url
        assert _get(url, "/health")[0] == 200
    finally:
        router.stop()


def test_create_takes_the_routers_own_group():
    config = RunConfig.of(RouterOptions(router_policy="round_robin"))
    assert create(config)._options == RouterOptions(router_policy="round_robin")


def _parse(*arguments):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return parser.parse_args(arguments)


def test_the_command_takes_short_and_long_flags(monkeypatch):
    ran = []
    monkeypatch.setattr("miles_router.server.run_router", lambda *args, **kwargs: ran.append((args, kwargs)))
    monkeypatch.setenv("MILES_ROUTER_TOKEN", "from-env")
    monkeypatch.setenv("MILES_ENGINE_KEY", "of-the-engines")
    flags = ("--host", "::1", "--router-policy", "round_robin", "--worker", "http://a:1", "--worker", "http://b:2")
    assert command.run(_parse("--port", "23456", *flags)) == 0
    (options, workers, key), kwargs = ran[0]
    assert options == RouterOptions(
        sglang_router_ip="::1", sglang_router_port=23456, router_policy="round_robin", router_token="from-env"
    )
    assert (workers, key) == (["http://a:1", "http://b:2"], "of-the-engines")
    assert kwargs == {"middleware": [], "replay": None, "parent_pid": None, "fd": None}


def test_importing_options_command_and_service_costs_no_web_server():
    script = "import sys, miles_router.command, miles_router.service; print({'uvicorn', 'uvloop'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    shown = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_a_flag_out_of_bounds_is_a_config_error():
    with pytest.raises(ConfigError, match="sglang_router_port"):
        command.run(_parse("--port", "70000"))


def test_the_command_prints_one_line_and_stops_when_interrupted():
    command_line = [sys.executable, "-P", "-m", "miles_router", "--worker", "http://127.0.0.1:1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    pipe = subprocess.PIPE
    with subprocess.Popen(command_line, stdout=pipe, stderr=pipe, text=True, env=environment) as process:
        first = process.stdout.readline()
        url = first.removeprefix(READY_PREFIX).strip()
        assert first == f"{READY_PREFIX}{url}\n"
        assert _get(url, "/list_workers")[1] == b'{"urls":["http://127.0.0.1:1"]}'
        process.send_signal(2)
        rest, errors = process.communicate(timeout=20)
    assert (rest, errors, process.returncode) == ("", "", 0)


def test_the_distribution_offers_command_service_and_options():
    try:
        metadata.distribution("miles-router")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from a source tree that is not installed")
    for group in ("miles.commands", "miles.services", "miles.options"):
        (entry,) = (e for e in metadata.entry_points(group=group, name="router"))
        assert entry.value.startswith("miles_router.")
        entry.load()
