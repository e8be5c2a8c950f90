"""Engines in Ray's processes start in their slots, die, and come back: two raylets on this machine."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.request

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


@pytest.fixture(scope="module")
def fleet(quickstart_data, tmp_path_factory):
    """Two engines on a cluster of two raylets, neither of which has room for both beside the trainer's slot."""
    raylets = Raylets(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    raylets.add_node(num_cpus=2)
    config = RunConfig.of(
        RunOptions(hf_checkpoint=str(quickstart_data / "model")), ParallelOptions(),
        ClusterOptions(ray_address=raylets.address), EngineFleetOptions(rollout_num_engines=2),
    )  # fmt: skip
    cluster = Cluster(config, lambda: None, tmp_path_factory.mktemp("stacks"))
    fleet = cluster.engines()
    fleet.start([Placement()] * 2)
    yield fleet
    fleet.stop()
    cluster.stop()
    for node in list(raylets.list_all_nodes()):
        # Nothing that ends gracefully is left.
        raylets.remove_node(node, allow_graceful=False)


def info(endpoint):
    with urllib.request.urlopen(endpoint.url + "/server_info", timeout=10) as answer:
        return json.loads(answer.read())


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
