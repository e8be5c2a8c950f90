"""A real trainer and real engines, without Ray: weights that do not arrive as they left stop the run by name."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from miles_api.checks.check import derive
from miles_api.errors import ServiceError
from miles_api.loading.load import provider
from miles_api.parsing.parse import parse_run
from miles_api.services import Endpoint, Placement
from miles_train.options import WeightSyncOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync.disk import DiskWeightSync, Source
from miles_train.weight_sync.verify import probe_tokens

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
VOCABULARY = 19
HEAD = "model.embed_tokens.weight"  # the output layer is tied to it
BATCH = {
    "tokens": [[3, 4, 5, 6 + i] for i in range(8)], "response_lengths": [2] * 8, "loss_masks": [[1, 1]] * 8,
    "rewards": [1.0, -1.0] * 4, "rollout_log_probs": [[-2.0, -2.0]] * 8,
}  # fmt: skip
NO_HASHES = {"/weights_checker": lambda body: (404, b"{}")}


@pytest.fixture(scope="module")
def config(quickstart_data, tmp_path_factory):
    words = ["--hf-checkpoint", quickstart_data / "model", "--prompt-data", quickstart_data / "train.jsonl"]
    words += ["--run-dir", tmp_path_factory.mktemp("run"), "--lr", 1e-2]
    return derive(parse_run([str(QUICKSTART), *map(str, words)]))


@pytest.fixture(scope="module")
def trainer(config):
    """One trainer rank whose weights are not those that the engines started with."""
    # It listens from here on: a port that was only looked up is taken by another process now and then.
    listener = socket.create_server(("127.0.0.1", 0))
    place = {"master_addr": "127.0.0.1", "master_port": listener.getsockname()[1], "listen_fd": listener.detach()}
    trainer = Trainer(config, rank=0, world_size=1, **place)
    trainer.start()
    trainer.train(0, BATCH)
    yield trainer
    trainer.stop()


@pytest.fixture(scope="module")
def fleet(config):
    fleet = provider("miles.services", "engines")(config)
    fleet.start([Placement(), Placement()])
    yield fleet
    fleet.stop()


@pytest.fixture
def make_sync(trainer, fleet, tmp_path):
    """Return a function that makes a synchronisation; `damage(tensors)` is done to the file before engines read it."""
    made = []

    def make(damage=None, endpoints=None, **more):
        def export(directory, checksums):
            sums = trainer.export(directory, True, checksums)
            if damage:
                path = Path(directory, "model.safetensors")
                tensors = load_file(path)
                damage(tensors)
                save_file(tensors, path, {"format": "pt"})
            return sums

        folder = tmp_path / f"weights{len(made)}"
        folder.mkdir()
        source = Source(export=export, score=trainer.score, tokens=probe_tokens(VOCABULARY))
        sync = DiskWeightSync(source, endpoints or fleet.endpoints(), folder, WeightSyncOptions(), **more)
        made.append(sync)
        return sync

    yield make
    for sync in made:
        sync.close()


@pytest.fixture
def lying(fleet):
    """Return a function that puts a server before engine 0 which answers some paths itself."""
    servers = []

    def make(answers):
        real = fleet.endpoints()[0].url

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.respond(self.rfile.read(int(self.headers["Content-Length"])))

            def do_GET(self):
                self.respond(None)

            def respond(self, body):
                status, content = answers[self.path](body) if self.path in answers else ask(real + self.path, body)
                self.send_response(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args): ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return Endpoint(url=f"http://127.0.0.1:{server.server_port}")

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


def ask(url, body):
    request = urllib.request.Request(url, body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return reply.status, reply.read()


def only_renames(fleet):
    """Make an engine take the new version and keep the old weights."""

    def update(body):
        version = {"new_version": json.loads(body)["weight_version"], "abort_all_requests": False}
        return ask(fleet.endpoints()[0].url + "/update_weight_version", json.dumps(version).encode())

    return {"/update_weights_from_disk": update}


def test_every_engine_proves_that_it_serves_the_trainers_weights(make_sync, fleet, tmp_path):
    metrics = make_sync().push(1)
    [file] = (tmp_path / "weights0").glob("*/model.safetensors")
    assert metrics["sync/checked"] == 2
    assert metrics["sync/checked_tensors"] == len(load_file(file)) > 20
    assert metrics["sync/probe_gap_max"] < 1e-4
    assert [endpoint.weight_version for endpoint in fleet.endpoints()] == ["1", "1"]


@pytest.mark.parametrize(
    "name", [HEAD, "model.layers.1.mlp.down_proj.weight", "model.layers.0.self_attn.k_norm.weight"]
)
def test_one_value_changed_on_the_way_names_exactly_its_tensor(make_sync, name):
    def damage(tensors):
        tensors[name].view(-1)[3] += 1e-6

    with pytest.raises(ServiceError, match=rf"Tensors 1 of other values: {name} \(\w+ here, \w+ there\)$"):
        make_sync(damage).push(2)


def test_tensors_that_were_swapped_on_the_way_are_both_named(make_sync):
    def damage(tensors):
        first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
        tensors[first], tensors[second] = tensors[second], tensors[first]

    with pytest.raises(
        ServiceError, match=r"2 of other values: model\.layers\.0\.self_attn\.q_proj\.weight .*layers\.1"
    ):
        make_sync(damage).push(3)


@pytest.mark.parametrize(
    ("answers", "problem"), [({}, rf"\d\d of other values: {HEAD} "), (NO_HASHES, "computes other log-probs")]
)
def test_an_engine_that_keeps_old_weights_under_the_new_version_is_found_out(
    make_sync, trainer, fleet, lying, answers, problem
):
    make_sync().push(4)
    trainer.train(1, BATCH)
    with pytest.raises(ServiceError, match=problem):
        make_sync(endpoints=[lying(only_renames(fleet) | answers)]).push(5)


def test_an_engine_that_names_another_version_is_found_out(make_sync, lying):
    liar = lying({"/model_info": lambda body: (200, b'{"weight_version": "0"}')})
    with pytest.raises(ServiceError, match=rf"{liar.url} took weights '6' but says it serves '0'"):
        make_sync(endpoints=[liar]).push(6)


def test_a_wrong_output_layer_shows_in_log_probs_where_hashes_are_not_offered(make_sync, lying):
    def damage(tensors):
        tensors[HEAD] = tensors[HEAD].roll(1, 0)

    with pytest.raises(ServiceError, match=r"computes other log-probs .* in the mean of probe sequence \d"):
        make_sync(damage, [lying(NO_HASHES)]).push(7)


def test_an_engine_killed_in_a_push_is_replaced_and_serves_what_the_others_serve(make_sync, fleet):
    sync = make_sync(patience=120)
    sync.push(8)
    dead = fleet.endpoints()[1]
    pid = json.loads(ask(dead.url + "/server_info", None)[1])["pid"]

    def supervise():
        new = fleet.restart(1)
        sync.replace(dead, new)
        sync.bring(new)

    os.kill(pid, signal.SIGKILL)
    thread = threading.Thread(target=supervise)
    thread.start()
    metrics = sync.push(9)
    thread.join(60)
    assert metrics == {}
    assert [endpoint.weight_version for endpoint in fleet.endpoints()] == ["9", "9"]
    assert sync.push(10)["sync/checked"] == 2
    assert json.loads(ask(fleet.endpoints()[1].url + "/server_info", None)[1])["paused"] is False
