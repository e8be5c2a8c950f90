"""The router against none, sglang-router, a FastAPI proxy and nginx: the same wrk and the same engines, in one run.

    hatch env create router-bench
    hatch run python benchmarks/router.py --others-python "$(hatch env find router-bench)/bin/python"

Needs `wrk`. All contestants run at once, and in each cell take turns: idle ones cost nothing. Requests a second, and
milliseconds at the 50th and 99th percentile. `--quick` takes about three minutes, `--only BODY` less. Absolute numbers
depend on the machine, where wrk, router and two engines share the cores: trust the ratios.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miles_router.options import READY_PREFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
BODIES = {"1 KB": 1 << 10, "64 KB": 64 << 10, "stream": 1 << 10}
CONNECTIONS = (1, 64, 512)
IDLE = 10_000
PASSING = """
class Passing:
    def __init__(self, app):
        self.app = app
    async def __call__(self, scope, receive, send):
        await self.app(scope, receive, send)
"""
LUA = """
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
wrk.body = io.open("{body}"):read("*a")
done = function(summary, latency, requests)
  local e = summary.errors
  print(string.format("RESULT %d %d %d %d %d", summary.requests, summary.duration, latency:percentile(50),
    latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""
NGINX = """
worker_processes 1; daemon off; error_log stderr crit; pid {folder}/pid;
events {{ worker_connections 4096; }}
http {{
  access_log off; client_body_temp_path {folder}; proxy_temp_path {folder}; client_max_body_size 64m;
  client_body_buffer_size 1m; keepalive_requests 1000000;
  upstream engines {{ least_conn; keepalive 1024; {servers} }}
  server {{ listen 127.0.0.1:{port} backlog=4096; location / {{
    proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }} }}
}}
"""


class Contestant(NamedTuple):
    """Somebody who serves at `url`."""

    name: str
    url: str
    process: subprocess.Popen[str]


class Cell(NamedTuple):
    """What wrk measured."""

    rate: float
    p50: float
    p99: float
    requests: int
    errors: int


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
    if shutil.which("nginx"):
        port = free_port()
        servers = "".join(f"server {engine.removeprefix('http://')};" for engine in engines)
        (folder / "nginx.conf").write_text(NGINX.format(folder=folder, port=port, servers=servers))
        yield "nginx", port, ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf")]


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


def body_of(kind: str) -> str:
    """Return a request body of the size that `kind` says."""
    stream = '"stream": true, ' if kind == "stream" else ""
    head, tail = "{" + stream + '"sampling_params": {"max_new_tokens": 8}, "text": "', '"}'
    return head + "x" * (BODIES[kind] - len(head) - len(tail)) + tail


def wrk(url: str, kind: str, connections: int, seconds: int, folder: Path) -> Cell:
    """Measure one cell."""
    body, script = folder / f"{BODIES[kind]}-{kind[0]}.json", folder / f"{kind.replace(' ', '')}.lua"
    body.write_text(body_of(kind))
    script.write_text(LUA.format(body=body))
    flags = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
    run = subprocess.run(["wrk", *flags, url + "/generate"], capture_output=True, text=True, check=True)
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    requests, micros, p50, p99, errors = map(int, line.split()[1:])
    return Cell(requests / micros * 1e6, p50 / 1e3, p99 / 1e3, requests, errors)


def compare(contestants: list[Contestant], kind: str, seconds: int, folder: Path) -> None:
    """Print the table of one kind of body."""
    print(f"\n## {kind}: requests/s, ms at p50 / p99 (÷ direct)\n")
    print("| | " + " | ".join(f"{c} connection{'s' * (c > 1)}" for c in CONNECTIONS) + " | RSS MB |")
    print("|---|" + "---|" * (len(CONNECTIONS) + 1))
    rows: dict[str, list[str]] = {one.name: [] for one in contestants}
    for connections in CONNECTIONS:
        direct = 0.0
        for one in contestants:
            # What the cell before left behind is not this one's.
            wait_until_served(one.url, one.process)
            cell = wrk(one.url, kind, connections, seconds, folder)
            direct = direct or cell.rate
            failed = f", **{cell.errors} errors**" if cell.errors else ""
            rows[one.name].append(
                f"{cell.rate:,.0f}, {cell.p50:.2f} / {cell.p99:.2f} ({cell.rate / direct:.2f}){failed}"
            )
    for one in contestants:
        print(f"| {one.name} | {' | '.join(rows[one.name])} | {memory(one.process.pid):.0f} |", flush=True)


def memory(pid: int) -> float:
    """Return the resident memory of a process in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmRSS"))


def flat_memory(one: Contestant, requests: int, folder: Path) -> None:
    """Print how memory grows over many requests, after as many as fill every pool."""
    wrk(one.url, "1 KB", 64, 2, folder)
    before, sent, errors = memory(one.process.pid), 0, 0
    while sent < requests:
        cell = wrk(one.url, "1 KB", 64, 5, folder)
        sent, errors = sent + cell.requests, errors + cell.errors
    after = memory(one.process.pid)
    print(f"{one.name}: {before:.1f} MB, after {sent:,} requests {after:.1f} MB ({errors} errors)", flush=True)


def idle_connections(one: Contestant, folder: Path) -> None:
    """Print what many idle connections cost, and whether others are served meanwhile and afterwards."""
    host, _, port = one.url.removeprefix("http://").partition(":")
    before = memory(one.process.pid)
    with contextlib.ExitStack() as opened:
        for _ in range(IDLE):
            client = opened.enter_context(socket.create_connection((host, int(port)), timeout=30))
            client.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
            if not client.recv(4096).startswith(b"HTTP/1.1 200"):
                sys.exit(f"{one.name} did not answer an idle connection")
        held = memory(one.process.pid)
        busy = wrk(one.url, "1 KB", 64, 2, folder)
    free = wrk(one.url, "1 KB", 64, 2, folder)
    print(
        f"{one.name}: {IDLE:,} idle connections take {(held - before) * 1024 / IDLE:.1f} KB each ({before:.0f} → "
        f"{held:.0f} MB, {memory(one.process.pid):.0f} MB after they left); requests/s among them {busy.rate:,.0f} "
        f"({busy.errors} errors), without them {free.rate:,.0f}",
        flush=True,
    )


def main() -> None:
    """Run what is asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--others-python", help="the Python that has sglang-router, fastapi and httpx")
    parser.add_argument("--seconds", type=int, default=5, help="of each cell (default: 5)")
    parser.add_argument("--quick", action="store_true", help="cells of 2 s, 50,000 requests for the memory")
    parser.add_argument("--only", choices=[*BODIES, "memory"], help="one table")
    parser.add_argument("--requests", type=int, default=200_000, help="how many the memory is watched over")
    given = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    seconds, requests = (2, 50_000) if given.quick else (given.seconds, given.requests)
    print(f"# {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; cells of {seconds} s, wrk with one thread")
    with tempfile.TemporaryDirectory(prefix="router-bench-") as name:
        folder = Path(name)
        with running(given.others_python, folder) as contestants:
            for kind in BODIES:
                if given.only in (None, kind):
                    compare(contestants, kind, seconds, folder)
            if given.only in (None, "memory"):
                print("\n## Memory\n")
                for one in contestants[1:3]:
                    flat_memory(one, requests, folder)
                idle_connections(contestants[1], folder)


if __name__ == "__main__":
    main()
