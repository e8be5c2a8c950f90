"""What two ranks export, send and say of it is what one rank exports, in every layout, before and after training."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file, save_file

from miles_api.checksum import checksums
from miles_api.services import Endpoint
from miles_train.options import ParallelOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync.plan import Plan
from miles_train.weight_sync.verify import probe_tokens

tiny = import_module("packages.miles-train.tests.tiny_trainer")

LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2},
    "sequence": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "pipeline": {"pipeline_model_parallel_size": 2},
    "data": {},
}
KINDS = ["qwen3-tied", "qwen3-untied", "qwen2", "bf16"]
TOKENS = probe_tokens(tiny.VOCAB)
BUCKET = 10_000  # bytes: less than the embedding of some, more than most tensors


class Receiving:
    """An engine that keeps what it is sent, by the path before the endpoint."""

    def __init__(self):
        self.buckets, receiving = {}, self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                receiving.keep(self.path.rpartition("/")[0], body)
                answer = b'{"success": true}'
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *args): ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def url(self, directory):
        return f"http://127.0.0.1:{self.server.server_port}{directory}"

    def keep(self, case, body):
        content = pickle.loads(base64.b64decode(body["serialized_named_tensors"][0]))
        flat = content["flattened_tensor"].clone()
        tensors = {m.name: flat[m.start_idx : m.end_idx].view(m.dtype).view(m.shape) for m in content["metadata"]}
        self.buckets.setdefault(case, []).append((tensors, body.get("weight_version"), body["flush_cache"]))


def note_weights(parallel, place, hf_dir, out, engine):
    """Start a trainer, export; train once, export again, send and score; note what this rank said of each."""
    trainer = Trainer(tiny.make_config(hf_dir, parallel), **place)
    trainer.start()
    loaded = trainer.export(f"{out}/loaded", True, True)
    silent = trainer.export(f"{out}/silent", True)
    trainer.train(0, tiny.make_batch())
    trained = trainer.export(f"{out}/trained", True, True)
    engines = [Endpoint(url=engine)]
    plan = Plan(how="tensor", version="7", receivers=engines, bucket_bytes=BUCKET, hashed=True, flush=True)
    sent = trainer.send_weights(plan)
    scores = trainer.score(TOKENS)
    trainer.stop()
    said = {"loaded": loaded, "silent": silent, "trained": trained, "scores": scores, "sent": sent.checksums}
    assert not sent.gone | sent.refused
    Path(out, f"rank{place['rank']}.json").write_text(json.dumps(said))


def run_rank(rank, cases, ports):
    for layout, hf_dir, out, engine in cases:
        parallel = ParallelOptions(actor_num_gpus_per_node=2, **LAYOUTS[layout])
        note_weights(parallel, tiny.meeting(rank, ports), hf_dir, out, engine)


def written(directory):
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.fixture(scope="module")
def sources(hf_dir, tmp_path_factory):
    """A model of each kind on the disk; one of them in bf16."""
    found = {kind: hf_dir(kind) for kind in KINDS if kind != "bf16"}
    found["bf16"] = str(tmp_path_factory.mktemp("bf16") / "model")
    shutil.copytree(found["qwen3-tied"], found["bf16"])
    halved = {name: tensor.bfloat16() for name, tensor in written(Path(found["bf16"])).items()}
    save_file(halved, f"{found['bf16']}/model.safetensors", {"format": "pt"})
    return found


@pytest.fixture(scope="module")
def receiving():
    receiving = Receiving()
    yield receiving
    receiving.server.shutdown()
    receiving.server.server_close()


@pytest.fixture(scope="module")
def noted(sources, receiving, tmp_path_factory):
    """Run every case, two ranks in one pair of processes and one rank here; return the directories."""
    out = {(layout, kind): tmp_path_factory.mktemp(layout) for layout in [*LAYOUTS, "alone"] for kind in KINDS}
    for kind in KINDS:
        alone = out["alone", kind]
        note_weights(ParallelOptions(), tiny.meeting(), sources[kind], str(alone), receiving.url(alone))
    places = [(layout, sources[kind], out[layout, kind]) for layout in LAYOUTS for kind in KINDS]
    cases = [(layout, source, str(place), receiving.url(place)) for layout, source, place in places]
    mp.spawn(run_rank, args=(cases, mp.get_context("spawn").SimpleQueue()), nprocs=2)
    return out


def said(directory, what):
    return [json.loads(path.read_text())[what] for path in sorted(directory.glob("rank*.json"))]


def all_sums(directory, what):
    """Merge the ranks' hashes; no tensor is hashed twice."""
    parts = said(directory, what)
    merged = {name: value for part in parts for name, value in part.items()}
    assert len(merged) == sum(map(len, parts))
    return merged


CASES = [(layout, kind) for layout in [*LAYOUTS, "alone"] for kind in KINDS]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_the_hashes_of_loaded_weights_are_those_of_the_source(noted, sources, layout, kind):
    assert all_sums(noted[layout, kind], "loaded") == checksums(written(Path(sources[kind])))
    assert set(map(len, said(noted[layout, kind], "silent"))) == {0}


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_the_hashes_of_trained_weights_are_those_of_the_files(noted, layout, kind):
    sums = all_sums(noted[layout, kind], "trained")
    assert sums == checksums(written(noted[layout, kind] / "trained"))
    loaded = all_sums(noted[layout, kind], "loaded")
    assert all(loaded[name] != value for name, value in sums.items())


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_what_is_sent_bucket_by_bucket_is_what_is_exported(noted, receiving, layout, kind):
    exported = written(noted[layout, kind] / "trained")
    buckets = receiving.buckets[str(noted[layout, kind])]
    sent = {name: tensor for tensors, _, _ in buckets for name, tensor in tensors.items()}
    assert sum(len(tensors) for tensors, _, _ in buckets) == len(sent) == len(exported)
    for name, tensor in exported.items():
        assert sent[name].dtype == tensor.dtype
        assert torch.equal(sent[name], tensor), name
    assert all_sums(noted[layout, kind], "sent") == all_sums(noted[layout, kind], "trained")


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_buckets_are_small_and_the_last_one_alone_names_the_version(noted, receiving, layout, kind):
    buckets = receiving.buckets[str(noted[layout, kind])]
    sizes = [[tensor.nbytes for tensor in tensors.values()] for tensors, _, _ in buckets]
    assert all(sum(each) <= BUCKET or len(each) == 1 for each in sizes)
    assert len(buckets) > 2
    assert [version for _, version, _ in buckets] == [None] * (len(buckets) - 1) + ["7"]
    assert [flush for _, _, flush in buckets] == [False] * (len(buckets) - 1) + [True]


@pytest.mark.parametrize(("layout", "kind"), CASES)
def test_the_trainer_gives_the_log_probs_that_transformers_computes_from_its_export(noted, layout, kind):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(noted[layout, kind] / "trained", dtype=torch.float32)
    for scores in filter(None, said(noted[layout, kind], "scores")):
        for tokens, log_probs in zip(TOKENS, scores, strict=True):
            with torch.no_grad():
                rows = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
            expected = rows.gather(-1, torch.tensor(tokens[1:])[:, None]).squeeze(-1)
            torch.testing.assert_close(torch.tensor(log_probs), expected, atol=2e-5, rtol=0)


def test_only_the_stage_that_sees_logits_gives_log_probs(noted):
    assert [bool(scores) for scores in said(noted["pipeline", "qwen2"], "scores")] == [False, True]
    assert all(said(noted["tensor", "qwen2"], "scores"))
