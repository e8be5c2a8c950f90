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
from miles_train.weight_sync.disk import DiskWay
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.link import Bucket
from miles_train.weight_sync.sent import SentWay
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


@pytest.fixture(params=["disk", "tensor", "broadcast"])
def how(request):
    return request.param


@pytest.fixture
def on_the_way(how, monkeypatch):
    """Return a function that has `damage(tensors)` done, in place, to what leaves the trainer before engines get it."""

    def to_files(damage, directory):
        path = Path(directory, "model.safetensors")
        tensors = load_file(path)
        damage(tensors)
        save_file(tensors, path, {"format": "pt"})

    def to_buckets(damage):
        pack = Bucket.pack

        def damaged(bucket, flat):
            pack(bucket, flat)
            parts = flat.split([tensor.nbytes for _, tensor in bucket.tensors])
            views = zip(bucket.tensors, parts, strict=True)
            damage({name: part.view(tensor.dtype).view(tensor.shape) for (name, tensor), part in views})

        monkeypatch.setattr(Bucket, "pack", damaged)

    def use(damage):
        if damage and how != "disk":
            to_buckets(damage)
        return (lambda directory: to_files(damage, directory)) if damage and how == "disk" else lambda directory: None

    return use


@pytest.fixture
def make_sync(trainer, fleet, tmp_path, how, on_the_way):
    """Return a function that makes a synchronisation; `damage(tensors)` is done to the weights on their way."""
    made = []

    def make(damage=None, endpoints=None, patience=0.0, **options):
        harm = on_the_way(damage)

        def export(directory, checksums):
            sums = trainer.export(directory, True, checksums)
            harm(directory)
            return sums

        folder = tmp_path / f"weights{len(made)}"
        folder.mkdir()
        tokens = probe_tokens(VOCABULARY)
        source = Source(export, trainer.score, tokens, trainer.send_weights, trainer.snapshot)
        options = WeightSyncOptions(**options)
        mode = options.pause_generation_mode
        way = DiskWay(source, folder, mode) if how == "disk" else SentWay(how, source, folder, options)
        sync = WeightSync(way, source, endpoints or fleet.endpoints(), options, patience=patience)
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


def test_every_engine_proves_that_it_serves_the_trainers_weights(make_sync, fleet, trainer, tmp_path):
    trainer.train(0, BATCH)
    metrics = make_sync(update_weight_buffer_size=100_000).push(1)
    sums = trainer.export(str(tmp_path / "export"), True, True)
    assert metrics["sync/checked"] == 2
    assert metrics["sync/checked_tensors"] == len(sums) > 20
    assert metrics["sync/probe_gap_max"] < 1e-4
    assert [endpoint.weight_version for endpoint in fleet.endpoints()] == ["1", "1"]
    for endpoint in fleet.endpoints():
        checked = json.loads(ask(endpoint.url + "/weights_checker", b'{"action": "checksum"}')[1])
        assert (checked["checksums"], checked["stale"]) == (sums, [])


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
        kept = tensors[first].clone()
        tensors[first].copy_(tensors[second])
        tensors[second].copy_(kept)

    with pytest.raises(
        ServiceError, match=r"2 of other values: model\.layers\.0\.self_attn\.q_proj\.weight .*layers\.1"
    ):
        make_sync(damage).push(3)


@pytest.mark.parametrize(
    ("answers", "problem"), [({}, rf"\d\d of other values: {HEAD} "), (NO_HASHES, "computes other log-probs")]
)
@pytest.mark.parametrize("how", ["disk"], indirect=True)
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
        tensors[HEAD].copy_(tensors[HEAD].roll(1, 0))

    with pytest.raises(ServiceError, match=r"computes other log-probs .* in the mean of probe sequence \d"):
        make_sync(damage, [lying(NO_HASHES)]).push(7)


def test_an_engine_killed_in_a_push_is_replaced_and_serves_what_the_others_serve(make_sync, trainer, fleet, tmp_path):
    dead, killed = fleet.endpoints()[1], threading.Event()
    pid = json.loads(ask(dead.url + "/server_info", None)[1])["pid"]

    def kill(tensors):
        if not killed.is_set():
            os.kill(pid, signal.SIGKILL)
            killed.set()

    sync = make_sync(kill, patience=120, update_weight_buffer_size=100_000)

    def supervise():
        killed.wait(60)
        new = fleet.restart(1)
        sync.replace(dead, new)
        sync.bring(new)

    thread = threading.Thread(target=supervise)
    thread.start()
    trainer.train(2, BATCH)
    sync.push(9)
    thread.join(60)
    assert [endpoint.weight_version for endpoint in fleet.endpoints()] == ["9", "9"]
    sums = trainer.export(str(tmp_path / "export"), True, True)
    for endpoint in fleet.endpoints():
        assert json.loads(ask(endpoint.url + "/weights_checker", b'{"action": "checksum"}')[1])["checksums"] == sums
        assert json.loads(ask(endpoint.url + "/server_info", None)[1])["paused"] is False
    assert sync.push(10)["sync/checked"] == 2


def test_an_engine_that_starts_anew_between_two_pushes_gets_the_weights_at_once(make_sync, trainer, fleet, tmp_path):
    sync, dead = make_sync(), fleet.endpoints()[1]
    trainer.train(3, BATCH)
    sync.push(11)
    os.kill(json.loads(ask(dead.url + "/server_info", None)[1])["pid"], signal.SIGKILL)
    new = fleet.restart(1)
    sync.replace(dead, new)
    sync.bring(new)
    checked = json.loads(ask(new.url + "/weights_checker", b'{"action": "checksum"}')[1])
    assert checked["checksums"] == trainer.export(str(tmp_path / "export"), True, True)
    assert fleet.endpoints()[1].weight_version == "11"
    trainer.train(4, BATCH)
    assert sync.push(12)["sync/checked"] == 2


def test_requests_go_on_while_weights_travel(make_sync, fleet):
    urls, paused = [endpoint.url for endpoint in fleet.endpoints()], []

    def look(tensors):
        paused.extend(json.loads(ask(url + "/server_info", None)[1])["paused"] for url in urls)

    make_sync(look, update_weight_buffer_size=100_000).push(13)
    assert paused
    assert not any(paused)


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
def test_requests_that_run_across_a_push_say_which_tokens_came_from_which_weights(make_sync, trainer, fleet, mode):
    sync, url = make_sync(pause_generation_mode=mode, weight_check_interval=0), fleet.endpoints()[0].url
    sampling = {"max_new_tokens": 25, "ignore_eos": True, "n": 250}
    asked = json.dumps({"input_ids": [3, 4, 5], "sampling_params": sampling}).encode()
    sync.push(100)
    for version in range(101, 120):
        box = []
        thread = threading.Thread(target=lambda box=box: box.append(json.loads(ask(url + "/generate", asked)[1])))
        thread.start()
        while not json.loads(ask(url + "/server_info", None)[1])["num_running_reqs"] and thread.is_alive():
            pass
        sync.push(version)
        thread.join(60)
        metas = [(len(reply["output_ids"]), reply["meta_info"]) for reply in box[0]]
        if mode == "abort" and any(meta["finish_reason"]["type"] == "abort" for _, meta in metas):
            return
        crossed = [(count, meta["weight_versions"]) for count, meta in metas if len(meta["weight_versions"]) > 1]
        if crossed:
            break
    assert crossed
    for count, spans in crossed:
        assert [span["version"] for span in spans] == [str(version - 1), str(version)]
        assert [spans[0]["start"], spans[0]["end"], spans[1]["end"]] == [0, spans[1]["start"], count]
