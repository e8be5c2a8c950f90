"""Engines and the router are killed in the middle of a run: it goes on and loses nothing, or it ends and says why."""

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import psutil
import pytest

from miles_api.record import read_dump

TIMEOUT = 240
SAMPLES = 16
"""In one rollout of `small_run`."""

# Requests and scores of a rollout wait as long as its file `closed-…` is there: faults hit it where they are meant to.
HOOKS = """
import asyncio
from pathlib import Path

from miles_rollout.generate.single_turn import generate as ask


async def passed(gate, sample):
    name = f"{gate}-{sample.index // 16}"
    Path(__file__).with_name(f"reached-{name}").touch()
    while Path(__file__).with_name(f"closed-{name}").exists():
        await asyncio.sleep(0.02)


async def generate(input):
    await passed("generate", input.sample)
    return await ask(input)


async def score(args, sample):
    await passed("score", sample)
    return float(sample.index % 2)
"""


class Stale(BaseHTTPRequestHandler):
    """An engine that is well and serves weights that the run had in the beginning; it notes what it is to generate."""

    protocol_version = "HTTP/1.1"
    asked: ClassVar[list] = []

    def do_GET(self):
        self.answer({"weight_version": "0"})

    def do_POST(self):
        self.asked.append(self.path)
        self.answer({"text": "", "output_ids": [], "meta_info": {}})

    def answer(self, value):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def stale():
    """Serve a `Stale` engine; returns its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Stale) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


class Run:
    """A `miles train` in a process of its own, whose services can be found, stopped and killed."""

    def __init__(self, folder, words, gates):
        self.folder = folder
        folder.mkdir(parents=True)
        (folder / "own.py").write_text(HOOKS)
        for gate in gates:
            (folder / f"closed-{gate}").touch()
        hooks = {"custom-generate-function-path": "generate", "custom-rm-path": "score"}
        words = [*words, *(word for flag, name in hooks.items() for word in (f"--{flag}", f"{folder}/own.py:{name}"))]
        self.said = (folder / "said").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "miles_api.cli", "train", *words],
            stdout=self.said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.seen = set()

    def until(self, condition):
        """Wait for a condition and return what it returned."""
        deadline = time.monotonic() + TIMEOUT
        while not (found := condition()):
            assert time.monotonic() < deadline, self.words()
            assert self.process.poll() is None, self.words()
            time.sleep(0.02)
        return found

    def reached(self, gate):
        self.until((self.folder / f"reached-{gate}").exists)
        self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))

    def open(self, gate):
        (self.folder / f"closed-{gate}").unlink()

    def running(self, module):
        """Return the processes of the run that run a module, by the port they listen on."""
        found = {}
        for child in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in child.cmdline():
                    ports = [c.laddr.port for c in child.net_connections() if c.status == psutil.CONN_LISTEN]
                    found |= dict.fromkeys(ports, child)
        return found

    def engines(self):
        return self.running("miles_rollout.engines.local")

    def router(self):
        return self.running("miles_router")

    def workers(self):
        """Return the router's rows, by the port of the engine."""
        (port,) = self.router()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/workers", timeout=10) as reply:
            return {int(row["url"].rpartition(":")[2]): row for row in json.load(reply)["workers"]}

    def add_worker(self, port, reason):
        """Register an engine that the driver knows nothing of, and wait until it is held back for this reason."""
        (router,) = self.router()
        url = f"http://127.0.0.1:{router}/add_worker?url=http://127.0.0.1:{port}"
        urllib.request.urlopen(urllib.request.Request(url, method="POST"), timeout=10).close()
        self.until(lambda: self.workers()[port]["reason"] == reason)

    def weights(self):
        """Return which weights the router's engines serve that may get requests."""
        return {row["weight_version"] for row in self.workers().values() if row["healthy"]}

    def pushes_to(self, port):
        """Say whether the driver talks to an engine directly, as it does for nothing but weights."""
        connections = psutil.Process(self.process.pid).net_connections()
        return any(c.raddr and c.raddr.port == port and c.status == psutil.CONN_ESTABLISHED for c in connections)

    def words(self):
        return (self.folder / "said").read_text()

    def finish(self):
        self.process.wait(TIMEOUT)
        self.said.close()
        return self.process.returncode

    def left(self):
        """Return what is still there of the processes that the run had started."""
        _, left = psutil.wait_procs(self.seen, timeout=20)
        return [p.cmdline() for p in left if p.status() != psutil.STATUS_ZOMBIE]

    def end(self):
        for process in [*self.seen, psutil.Process(self.process.pid)] if self.process.poll() is None else self.seen:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def start(small_run, quickstart_data, tmp_path):
    runs = []
    # One held-out prompt, whose index is that of a sample of the first rollout: no gate is closed for it.
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text((quickstart_data / "heldout.jsonl").read_text().splitlines()[0] + "\n")

    def begin(*gates, flags=(), **changes):
        words = [*small_run(**{"rollout_num_engines": 2, "eval_prompt_data": held_out, **changes}), *flags]
        runs.append(Run(tmp_path / "faults", words, gates))
        return runs[-1]

    yield begin
    for run in runs:
        run.end()


def rows(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if line["kind"] == "rollout"]


def test_killed_engines_and_a_killed_router_are_replaced_and_no_sample_is_lost_or_doubled(start, stale, tmp_path):
    dump = tmp_path / "dump.miles"
    gates = ("generate-1", "generate-2", "score-3", "generate-4")
    run = start(*gates, num_rollout=5, save_debug_rollout_data=dump)

    # An engine in the middle of a rollout, with requests that it never answers.
    run.reached("generate-1")
    first, second = sorted(run.engines())
    run.engines()[first].suspend()
    run.open("generate-1")
    run.until(lambda: run.workers()[first]["outstanding"])
    run.engines()[first].kill()

    # The router in the middle of a rollout, with requests that an engine holds.
    run.reached("generate-2")
    run.until(lambda: len(run.workers()) == 2)
    assert run.weights() == {"2"}
    engine = run.engines()[second]
    engine.suspend()
    run.open("generate-2")
    run.until(lambda: run.workers()[second]["outstanding"])
    ((_, router),) = run.router().items()
    router.kill()
    engine.resume()

    # An engine during the weight sync after a rollout.
    run.reached("score-3")
    run.until(lambda: not any(row["outstanding"] for row in run.workers().values()))
    engine.suspend()
    run.open("score-3")
    run.until(lambda: run.pushes_to(second))
    engine.kill()

    # Both engines, while nobody asks them for anything; one that missed every push is put at the replaced router.
    run.reached("generate-4")
    run.until(lambda: run.weights() == {"4"} and len(run.workers()) == 2)
    run.add_worker(stale, "serves weights 0, not 4")
    for engine in run.engines().values():
        engine.kill()
    run.open("generate-4")
    assert run.finish() == 0, run.words()

    rollouts = [record for record in read_dump(dump) if not record.evaluation]
    assert [rollout.rollout_id for rollout in rollouts] == list(range(5))
    for rollout in rollouts:
        samples = [sample for group in rollout.groups for sample in group.samples]
        first_index = rollout.rollout_id * SAMPLES
        assert sorted(sample.index for sample in samples) == list(range(first_index, first_index + SAMPLES))
        assert {version for sample in samples for version in sample.weight_versions} == {rollout.weight_version}
    assert len({rollout.weight_version for rollout in rollouts}) == 5
    assert Stale.asked == []
    metrics = rows(tmp_path)
    assert max(row["train/logprob_gap_max"] for row in metrics) < 1e-4
    totals = Counter()
    for row in metrics:
        totals.update({name: value for name, value in row.items() if name.endswith(("restarts", "request_retries"))})
    assert totals["engines/restarts"] == 4
    assert totals["router/restarts"] == 1
    assert totals["rollout/request_retries"] >= 1
    said = run.words()
    assert said.count("is replaced, restart") == 5
    assert said.count("is back after") == 5
    assert run.left() == []


def test_the_only_engine_of_a_run_without_trainer_is_replaced_until_the_budget_is_spent_and_no_process_is_left(
    start, tmp_path
):
    run = start(
        "generate-1", "generate-2", rollout_num_engines=1, num_rollout=1000, engine_max_restarts=1,
        flags=["--debug-rollout-only"],
    )  # fmt: skip
    run.reached("generate-1")
    ((_, engine),) = run.engines().items()
    engine.kill()
    run.open("generate-1")

    run.reached("generate-2")
    assert rows(tmp_path)[1]["engines/restarts"] == 1
    assert rows(tmp_path)[1]["rollout/request_retries"] >= 1
    ((_, engine),) = run.engines().items()
    engine.kill()
    # Its requests go on waiting at their gate: it is not they who end the run.
    assert run.finish() == 1, run.words()
    assert "engine 0 is lost: --engine-max-restarts 1 allows no further restart" in run.words()
    assert f"(pid {engine.pid}) died with exit code -9" in run.words()
    assert run.left() == []


def test_a_port_that_is_taken_ends_the_start_with_the_flag_and_leaves_no_process(start):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        run = start(rollout_engine_base_port=port, flags=["--debug-rollout-only"])
        assert run.finish() == 1, run.words()
    assert f"engine 0 cannot listen on 127.0.0.1:{port}" in run.words()
    assert f"--rollout-engine-base-port {port} gives it this port" in run.words()
    assert not [p for p in psutil.process_iter(["ppid"]) if p.info["ppid"] == run.process.pid]
