"""Engines on another Ray node than the driver: reached at its address, by a key. Two raylets on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import ray
from ray.cluster_utils import Cluster as Raylets

from miles_api.config import RunConfig
from miles_api.run_options import RunOptions
from miles_api.services import Placement
from miles_rollout.options import EngineFleetOptions
from miles_train.driver.cluster import Cluster
from miles_train.options import ClusterOptions, ParallelOptions

WITHIN = 60.0
THERE = "127.0.0.2"
"""Another node's address, which this machine has too; the driver's node has the one that Ray finds."""
KEY = "the-key-of-this-run"

# What is seen while the run goes on, from the process that samples.
LOOKS = """
import contextlib, json, urllib.error, urllib.request
from pathlib import Path

def status(url, **headers):
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""

def look(args, sample):
    file = Path(args.run_dir, "seen.json")
    if not file.exists():
        router = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        (engine,) = json.loads(status(router + "/list_workers")[1])["urls"]
        lines = []
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                lines.append(process.read_text(errors="replace"))
        told = [status(router + path, Authorization="Bearer mine") for path in ("/server_info", "/workers", "/status")]
        file.write_text(json.dumps({
            "engine": engine, "bare": status(engine + "/server_info")[0], "lines": lines, "told": told,
            "router": status(router + "/model_info", Authorization="Bearer mine")[0],
        }))
    return 1.0 if sample.response == sample.label else 0.0
"""


@pytest.fixture(scope="module")
def raylets():
    """Two nodes; the driver's has room for the rollout process alone."""
    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    raylets.add_node(num_cpus=3, node_ip_address=THERE)
    yield raylets
    for node in list(raylets.list_all_nodes()):
        # Nothing that ends gracefully is left.
        raylets.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="module")
def finished(raylets, quickstart_data, tmp_path_factory):
    """A run of two rollouts whose engine asks for a key of the user's; its directory, what it said, what was seen."""
    folder = tmp_path_factory.mktemp("elsewhere") / "run"
    (folder.parent / "looks.py").write_text(LOOKS)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = {
        "hf_checkpoint": quickstart_data / "model", "prompt_data": quickstart_data / "train.jsonl",
        "eval_prompt_data": quickstart_data / "heldout.jsonl", "run_dir": folder,
        "num_rollout": 2, "rollout_batch_size": 4, "n_samples_per_prompt": 4,
        "custom_rm_path": f"{folder.parent}/looks.py:look", "ray_address": raylets.address,
        "engine_key_variable": "OUR_KEY", "update_weight_transfer_mode": "broadcast", "sglang_router_port": port,
    }  # fmt: skip
    flags = [word for name, value in words.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    toml = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
    run = subprocess.run(
        [sys.executable, "-m", "miles_api.cli", "train", str(toml), *flags],
        env={**os.environ, "OUR_KEY": KEY}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run, json.loads((folder / "seen.json").read_text())


def test_the_engine_of_a_run_is_reached_on_another_node_with_the_key_alone(finished):
    _, _, seen = finished
    assert urlsplit(seen["engine"]).hostname == THERE
    assert (seen["bare"], seen["router"]) == (401, 200)


def test_the_key_is_in_no_file_of_the_run_on_no_command_line_and_in_no_answer(finished):
    folder, run, seen = finished
    assert KEY not in run.stdout + run.stderr
    assert len(seen["lines"]) > 3
    assert KEY not in str(seen["lines"])
    assert [status for status, _ in seen["told"]] == [200, 200, 200]
    assert KEY not in str(seen["told"])
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert folder / "report.html" in files
    assert [file for file in files if KEY.encode() in file.read_bytes()] == []
    assert 'engine_key_variable = "OUR_KEY"' in (folder / "config.toml").read_text()


@pytest.fixture(scope="module")
def fleet(raylets, quickstart_data, tmp_path_factory):
    """Two engines on the node that is not the driver's, at all of its addresses, beside the trainer's slot."""
    config = RunConfig.of(
        RunOptions(hf_checkpoint=str(quickstart_data / "model")), ParallelOptions(),
        ClusterOptions(ray_address=raylets.address), EngineFleetOptions(rollout_num_engines=2, engine_host="0.0.0.0"),
    )  # fmt: skip
    cluster = Cluster(config, lambda: None, tmp_path_factory.mktemp("stacks"))
    fleet = cluster.engines()
    fleet.start([Placement()] * 2)
    yield fleet
    fleet.stop()
    cluster.stop()


def info(endpoint):
    asked = urllib.request.Request(endpoint.url + "/server_info", headers={"Authorization": f"Bearer {endpoint.key}"})
    with urllib.request.urlopen(asked, timeout=10) as answer:
        return json.loads(answer.read())


def test_engines_that_listen_everywhere_are_reached_at_their_node_and_ask_for_a_key_that_was_made_up(fleet):
    for endpoint in fleet.endpoints():
        assert urlsplit(endpoint.url).hostname == THERE
        assert len(endpoint.key) > 32
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(endpoint.url + "/server_info", timeout=10)


def death_of(fleet, index):
    deadline = time.monotonic() + WITHIN
    while time.monotonic() < deadline:
        if index in (dead := fleet.dead()):
            return dead[index]
        time.sleep(0.05)
    raise AssertionError("nobody noticed the death")


def test_every_engine_answers_from_a_process_of_its_own(fleet):
    pids = {info(endpoint)["pid"] for endpoint in fleet.endpoints()}
    assert len(pids) == 2
    assert fleet.dead() == {}


def test_an_engine_that_dies_is_noticed_and_replaced_in_its_process(fleet):
    host = fleet._engines[0][0].actor
    os.kill(info(fleet.endpoints()[0])["pid"], signal.SIGKILL)
    assert "-9" in death_of(fleet, 0)
    endpoint = fleet.restart(0)
    assert info(endpoint)["pid"] > 0
    assert fleet._engines[0][0].actor is host
    assert fleet.dead() == {}


def test_an_engine_whose_process_on_the_node_dies_gets_another_one(fleet):
    before = info(fleet.endpoints()[1])["pid"]
    ray.kill(fleet._engines[1][0].actor)
    assert "engine host 1" in death_of(fleet, 1)
    endpoint = fleet.restart(1)
    assert info(endpoint)["pid"] != before
    assert fleet.dead() == {}
    assert fleet.endpoints()[1].url == endpoint.url
