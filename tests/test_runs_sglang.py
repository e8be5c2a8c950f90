"""Whole runs with the real SGLang on the CPU, where `MILES_SGLANG_PYTHON` names a Python that has it.

Runs that launch servers take minutes; the others attach to one server that they share.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest

from miles_api.record import read_dump
from miles_api.services import Placement
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

from .test_faults_serving import SAMPLES, Run
from .test_weight_sync_sglang import UNFUSED

PYTHON = os.environ.get("MILES_SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="MILES_SGLANG_PYTHON names no Python with SGLang"),
    pytest.mark.timeout(1200),
]
ROLLOUTS = 4
PATIENCE = 60
VARIABLE = "MILES_TEST_KEY"
# The model without warm-up sorts nothing: rewards that differ let it learn something.
REWARD = """
def score(args, sample):
    return float(sum(sample.tokens) % 3)
"""


class OnSGLang(Run):
    """A run in the background that launches SGLang."""

    def engines(self):
        """Return the SGLang servers, by port; each is a child of the guard that the driver started."""
        found = {}
        for guard in psutil.Process(self.process.pid).children():
            with contextlib.suppress(psutil.NoSuchProcess):
                words = guard.cmdline()
                if "sglang.launch_server" in words:
                    found |= {int(words[words.index("--port") + 1]): server for server in guard.children()}
        return found


@pytest.fixture
def start(small_run, quickstart_data, tmp_path):
    """Start a run that waits at gates."""
    # One held-out prompt, whose index is that of a sample of the first rollout: later gates are not its own.
    held_out = tmp_path / "heldout.jsonl"
    held_out.write_text((quickstart_data / "heldout.jsonl").read_text().splitlines()[0] + "\n")
    with contextlib.ExitStack() as stack:

        def started(*gates, **changes):
            words = small_run(
                rollout_engine="sglang", sglang_python=PYTHON, engine_start_timeout=600, eval_prompt_data=held_out,
                **changes,
            )  # fmt: skip
            run = OnSGLang(tmp_path / "faults", words, gates)
            stack.callback(run.end)
            return run

        yield started


@pytest.fixture(scope="module")
def server(quickstart_data):
    """Serve the quickstart's model by SGLang, which asks for a key."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, "of-the-attached")
        fleet = SGLangFleet(
            SGLangOptions(sglang_python=PYTHON),
            EngineFleetOptions(engine_start_timeout=600, engine_key_variable=VARIABLE),
            str(quickstart_data / "model"), seed=0,
        )  # fmt: skip
        fleet.start([Placement()])
        yield fleet
        fleet.stop()


def rows(tmp_path):
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["metrics"] for line in lines if line["kind"] == "rollout"]


def require_every_prompt_once_and_weights_that_arrived(dump, metrics, *, in_flight=False):
    rollouts = [record for record in read_dump(dump) if not record.evaluation]
    indices = [[sample.index for group in record.groups for sample in group.samples] for record in rollouts]
    assert list(map(sorted, indices)) == [list(range(i * SAMPLES, (i + 1) * SAMPLES)) for i in range(ROLLOUTS)]
    for record in rollouts:
        samples = [sample for group in record.groups for sample in group.samples]
        versions = {version for sample in samples for version in sample.weight_versions}
        assert record.weight_version in versions if in_flight else versions == {record.weight_version}
    assert all(row["sync/checked_tensors"] == UNFUSED for row in metrics)
    assert all(row["sync/probe_gap_max"] < 1e-4 for row in metrics)


def test_one_of_two_servers_is_killed_with_requests_in_it_and_its_successor_proves_the_weights(start, tmp_path):
    dump = tmp_path / "dump.miles"
    run = start(
        "generate-1", "generate-2", num_rollout=ROLLOUTS, rollout_num_engines=2, weight_check_interval=1,
        save_debug_rollout_data=dump,
    )  # fmt: skip
    run.reached("generate-1")
    servers = run.engines()
    assert len(servers) == len(run.workers()) == 2
    first, second = sorted(servers)
    family = [servers[first], *servers[first].children(recursive=True)]
    for process in family:
        process.suspend()
    run.open("generate-1")
    run.until(lambda: run.workers()[first]["outstanding"])
    servers[first].kill()
    run.reached("generate-2")
    run.until(lambda: "engine 0 is back after" in run.words() or "engine 1 is back after" in run.words())
    run.until(lambda: run.weights() == {"2"} and len(run.workers()) == 2)
    assert second in run.workers()
    run.seen |= set(psutil.Process(run.process.pid).children(recursive=True))
    run.open("generate-2")
    assert run.finish() == 0, run.words()
    metrics = rows(tmp_path)
    require_every_prompt_once_and_weights_that_arrived(dump, metrics)
    assert sum(row.get("engines/restarts", 0) for row in metrics) == 1
    assert max(row["train/logprob_gap_max"] for row in metrics) < 1e-4
    assert run.left() == []


@pytest.mark.parametrize("moment", ["start", "rollout"])
def test_nothing_of_sglang_outlives_a_driver_that_is_killed(start, moment):
    run = start("generate-0")
    if moment == "rollout":
        run.reached("generate-0")
    family = run.until(lambda: [p for one in run.engines().values() for p in (one, *one.children(recursive=True))])
    assert moment == "start" or len(family) >= 3
    run.process.kill()
    run.process.wait()
    _, left = psutil.wait_procs(family, timeout=PATIENCE)
    assert [process for process in left if process.status() != psutil.STATUS_ZOMBIE] == []


def test_ctrl_c_ends_sglang_with_the_run(start):
    run = start("generate-0")
    run.reached("generate-0")
    assert len(run.engines()) == 1
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.finish() == 128 + signal.SIGINT
    assert run.left() == []


@pytest.mark.parametrize(
    ("way", "schedule"),
    [
        ("disk", ["--offload-rollout", "--offload-train"]),
        ("tensor", ["--rollout-schedule", "one-step-off"]),
        ("broadcast", ["--rollout-schedule", "in-flight"]),
    ],
)
def test_runs_attach_to_one_server_after_another_and_leave_it_running(server, small_run, tmp_path, way, schedule):
    dump = tmp_path / "dump.miles"
    (tmp_path / "own.py").write_text(REWARD)
    words = small_run(
        rollout_engine="sglang", rollout_engine_urls=server.endpoints()[0].url, engine_key_variable=VARIABLE,
        num_rollout=ROLLOUTS, weight_check_interval=1, update_weight_transfer_mode=way, save_debug_rollout_data=dump,
        custom_rm_path=f"{tmp_path}/own.py:score",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "miles_api.cli", "train", *words, *schedule],
        capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    metrics = rows(tmp_path)
    require_every_prompt_once_and_weights_that_arrived(dump, metrics, in_flight="in-flight" in schedule)
    if "one-step-off" in schedule:
        assert [row["rollout/staleness"] for row in metrics] == [0, 1, 1, 1]
    assert server.endpoints()[0].weight_version == str(ROLLOUTS)
