"""Engines that somebody else runs: a stand-in for SGLang is started here and attached to."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from miles_api.errors import ServiceError
from miles_api.services import EngineFleet, Placement
from miles_rollout.engines.asking import request
from miles_rollout.engines.sglang.attached import AttachedFleet

STAND_IN = str(Path(__file__).with_name("stand_in"))


@pytest.fixture(scope="module")
def models_on_disk(tmp_path_factory):
    """Two models: `letters` has the tokens of the stand-in, a letter's code point, and `words` has others."""
    root = tmp_path_factory.mktemp("models")
    for name, vocabulary in (("letters", {chr(code): code for code in range(0x7000)}), ("words", {"<unk>": 0})):
        (root / name).mkdir()
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" " if name == "letters" else "<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
        tokenizer.decoder = decoders.Fuse()
        tokenizer.save(str(root / name / "tokenizer.json"))
    return root


@pytest.fixture
def serve():
    servers = []

    def start(model="elsewhere/letters", *more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", str(port), *more]
        servers.append(subprocess.Popen(command, env={**os.environ, "PYTHONPATH": STAND_IN}, start_new_session=True))
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 20
        while True:
            try:
                request(url + "/health", None, 5)
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            else:
                return url, servers[-1]

    yield start
    for server in servers:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def about(url):
    return request(url + "/server_info", None, 10)


def test_running_servers_are_used_and_left_running(serve, models_on_disk):
    (first, server), (second, _) = serve(models_on_disk / "letters"), serve()
    request(second + "/pause_generation", {}, 5)  # as a run that was killed leaves it
    fleet = AttachedFleet([first, second], str(models_on_disk / "letters"), health_timeout=60)
    assert isinstance(fleet, EngineFleet)
    fleet.start([Placement(), Placement()])
    assert [endpoint.url for endpoint in fleet.endpoints()] == [first, second]
    assert not about(second)["paused"]
    fleet.pause()
    assert about(first)["paused"]
    fleet.resume()
    assert not about(first)["paused"]
    assert fleet.dead() == {}
    fleet.stop()
    fleet.stop()
    assert server.poll() is None
    assert about(first)
    with pytest.raises(ServiceError, match="were stopped"):
        fleet.start([Placement(), Placement()])


def test_a_server_is_known_by_its_tokens_when_its_weights_have_been_replaced(serve, models_on_disk):
    url, _ = serve(models_on_disk / "letters")
    request(url + "/update_weights_from_disk", {"model_path": "/dev/shm/gone", "weight_version": "9"}, 5)
    fleet = AttachedFleet([url], str(models_on_disk / "letters"), health_timeout=0)
    fleet.start([Placement()])
    assert fleet.endpoints()[0].weight_version == "9"


def test_a_server_of_another_model_is_refused_by_name(serve, models_on_disk):
    url, _ = serve()
    fleet = AttachedFleet([url], str(models_on_disk / "words"), health_timeout=0)
    with pytest.raises(ServiceError, match=f"{url} serves elsewhere/letters, with other tokens than --hf-checkpoint"):
        fleet.start([Placement()])


def test_a_server_that_another_run_of_this_machine_uses_is_refused_until_that_has_ended(serve, models_on_disk):
    url, _ = serve(models_on_disk / "letters")
    model = str(models_on_disk / "letters")
    first, second = (
        AttachedFleet([each], model, health_timeout=0) for each in (url, url.replace("127.0.0.1", "localhost"))
    )
    first.start([Placement()])
    with pytest.raises(ServiceError, match=r"is used by another run of this machine"):
        second.start([Placement()])
    first.stop()
    second.start([Placement()])
    second.stop()


def test_a_server_with_a_key_is_used_with_that_key_and_refused_by_the_options_name_without(serve, models_on_disk):
    model = str(models_on_disk / "letters")
    url, _ = serve(model, "--api-key", "theirs")
    for key, advice in (("", "asks for a key"), ("other", "does not take the key")):
        fleet = AttachedFleet([url], model, health_timeout=0, key=key)
        with pytest.raises(ServiceError, match=f"refused /model_info with 401: it {advice}.*--engine-key-variable"):
            fleet.start([Placement()])
    fleet = AttachedFleet([url], model, health_timeout=60, key="theirs")
    fleet.start([Placement()])
    (endpoint,) = fleet.endpoints()
    assert (endpoint.key, endpoint.weight_version) == ("theirs", "")
    fleet.pause()
    assert request(url + "/server_info", None, 10, "theirs")["paused"]
    fleet.stop()


def test_a_server_that_speaks_another_protocol_is_named(models_on_disk):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"model_path": 7}')

        def log_message(self, *_):
            pass

    with HTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        fleet = AttachedFleet([url], str(models_on_disk / "words"), health_timeout=0)
        with pytest.raises(ServiceError, match=rf"{url} answers /model_info otherwise than SGLang: .*model_path"):
            fleet.start([Placement()])
        assert fleet.endpoints()[0].weight_version == ""
        server.shutdown()


def test_a_server_that_is_not_there_is_named(models_on_disk):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    fleet = AttachedFleet([url], str(models_on_disk / "words"), health_timeout=0)
    with pytest.raises(ServiceError, match=rf"{url} \(--rollout-engine-urls\) does not answer /model_info.*running\?"):
        fleet.start([Placement()])
    with pytest.raises(ServiceError, match="names 1 engines, and 2 are wanted"):
        fleet.start([Placement(), Placement()])


def test_a_server_that_stops_reacting_is_reported_and_cannot_be_restarted_from_here(serve, models_on_disk, capfd):
    url, server = serve(models_on_disk / "letters")
    fleet = AttachedFleet([url], str(models_on_disk / "letters"), health_timeout=0.4)
    fleet.start([Placement()])
    os.kill(server.pid, signal.SIGSTOP)
    deadline = time.monotonic() + 20
    while not fleet.dead():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert f"engine 0 at {url} does not answer /server_info for 0.4 s (--engine-health-timeout)" in fleet.dead()[0]
    with pytest.raises(ServiceError, match=r"not ours to restart: start it again where it runs.*--resume"):
        fleet.restart(0)
    os.kill(server.pid, signal.SIGCONT)
    while fleet.dead():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    fleet.stop()
    assert url in capfd.readouterr().err
