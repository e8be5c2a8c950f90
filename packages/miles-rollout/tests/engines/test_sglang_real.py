"""The real SGLang, where `MILES_SGLANG_PYTHON` names a Python that has it; a server takes a minute to start."""

from __future__ import annotations

import os
import signal
import time

import psutil
import pytest

from miles_api.services import Placement
from miles_rollout.engines.asking import request
from miles_rollout.engines.sglang.arguments import OWNED, ask_arguments, find_sglang
from miles_rollout.engines.sglang.attached import AttachedFleet
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions

PYTHON = os.environ.get("MILES_SGLANG_PYTHON", "")
pytestmark = [
    pytest.mark.skipif(not PYTHON, reason="MILES_SGLANG_PYTHON names no Python with SGLang"),
    pytest.mark.timeout(1200),
]
SHORT = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def fleet(kit):
    options = SGLangOptions(sglang_python=PYTHON, sglang_args={"max_running_requests": 8})
    addresses = EngineFleetOptions(engine_start_timeout=600)
    fleet = SGLangFleet(options, addresses, str(kit.directory("qwen3")), seed=1, health_timeout=60)
    fleet.start([Placement()])
    yield fleet
    fleet.stop()


def generate(url):
    body = {"input_ids": [5, 6, 7], "sampling_params": SHORT, "return_logprob": True}
    return request(url + "/generate", body, 60)


def test_what_we_set_ourselves_is_an_argument_of_the_installed_sglang_and_is_refused():
    verdict = ask_arguments(find_sglang(PYTHON), dict.fromkeys(OWNED, "1"))
    assert {name: text for name, text in verdict.problems.items() if not text.startswith("not passed on")} == {}
    assert set(verdict.problems) == set(OWNED)
    accepted = ask_arguments(find_sglang(PYTHON), {"context_length": 64, "disable_radix_cache": True})
    assert accepted.words == ["--context-length", "64", "--disable-radix-cache"]


def test_a_paused_server_still_says_that_it_lives(fleet):
    url = fleet.endpoints()[0].url
    assert len(generate(url)["output_ids"]) == 4
    info = request(url + "/server_info", None, 30)
    assert (info["device"], info["max_running_requests"], info["random_seed"]) == ("cpu", 8, 1009)
    fleet.pause()
    assert request(url + "/server_info", None, 30)["version"]
    fleet.resume()
    assert len(generate(url)["output_ids"]) == 4


def test_a_running_server_can_be_attached_to(fleet, kit):
    endpoint = fleet.endpoints()[0]
    other = str(kit.directory("qwen3", seed=1))  # another path, the same tokens
    attached = AttachedFleet([endpoint.url], other, health_timeout=60)
    attached.start([Placement()])
    attached.stop()
    assert len(generate(endpoint.url)["output_ids"]) == 4


def test_a_killed_server_leaves_nothing_and_its_successor_has_no_weights_of_the_run(fleet, kit):
    url = fleet.endpoints()[0].url
    update = {"model_path": str(kit.directory("qwen3", seed=1)), "weight_version": "7"}
    assert request(url + "/update_weights_from_disk", update, 120)["success"]
    assert fleet.endpoints()[0].weight_version == "7"
    guard = psutil.Process(fleet._children[0].process.pid)
    family = guard.children(recursive=True)
    assert len(family) >= 3  # HTTP server, scheduler, detokenizer
    os.kill(family[0].pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while not fleet.dead() or any(one.is_running() and one.status() != psutil.STATUS_ZOMBIE for one in family):
        assert time.monotonic() < deadline, (fleet.dead(), family)
        time.sleep(0.1)
    new = fleet.restart(0)
    assert request(new.url + "/model_info", None, 30)["weight_version"] == "default"
    assert fleet.dead() == {}
