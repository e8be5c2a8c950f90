"""The real SGLang takes weights by every way while it generates, and says which tokens came from which.

Where `MILES_SGLANG_PYTHON` names a Python that has it (a server takes a minute to start), or `MILES_SGLANG_URL` a
server of the quickstart's model on the CPU, in fp32.
"""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest

from miles_api.checks.check import derive
from miles_api.parsing.parse import parse_run
from miles_api.services import Endpoint, Placement
from miles_rollout.engines.sglang.fleet import SGLangFleet
from miles_rollout.engines.sglang.options import SGLangOptions
from miles_rollout.options import EngineFleetOptions
from miles_train.options import WeightSyncOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync.disk import DiskWay
from miles_train.weight_sync.engine import ask
from miles_train.weight_sync.frame import Source, WeightSync
from miles_train.weight_sync.sent import SentWay
from miles_train.weight_sync.verify import probe_tokens

from .test_weight_sync import BATCH, QUICKSTART, VOCABULARY

pytestmark = [
    pytest.mark.skipif(
        not {"MILES_SGLANG_PYTHON", "MILES_SGLANG_URL"} & os.environ.keys(), reason="no SGLang is named"
    ),
    pytest.mark.timeout(900),
]
UNFUSED = 13  # of the quickstart's two layers: two norms of each, of q and of k, both output projections; the last norm


@pytest.fixture(scope="module")
def engine(quickstart_data):
    if url := os.environ.get("MILES_SGLANG_URL"):
        yield Endpoint(url=url)
        return
    options = SGLangOptions(sglang_python=os.environ["MILES_SGLANG_PYTHON"])
    fleet = SGLangFleet(options, EngineFleetOptions(engine_start_timeout=600), str(quickstart_data / "model"), seed=0)
    fleet.start([Placement()])
    yield fleet.endpoints()[0]
    fleet.stop()


@pytest.fixture(scope="module")
def trainer(quickstart_data, tmp_path_factory):
    words = ["--hf-checkpoint", quickstart_data / "model", "--prompt-data", quickstart_data / "train.jsonl"]
    words += ["--run-dir", tmp_path_factory.mktemp("run"), "--lr", 1e-2]
    listener = socket.create_server(("127.0.0.1", 0))
    place = {"master_addr": "127.0.0.1", "master_port": listener.getsockname()[1], "listen_fd": listener.detach()}
    trainer = Trainer(derive(parse_run([str(QUICKSTART), *map(str, words)])), rank=0, world_size=1, **place)
    trainer.start()
    yield trainer
    trainer.stop()


@pytest.mark.parametrize("mode", ["retract", "in_place", "abort"])
@pytest.mark.parametrize("how", ["disk", "tensor", "broadcast"])
def test_sglang_proves_new_weights_and_stamps_the_requests_that_they_met(engine, trainer, tmp_path, how, mode):
    trainer.train(0, BATCH)
    options = WeightSyncOptions(pause_generation_mode=mode, update_weight_buffer_size=400_000)
    source = Source(
        lambda directory, hashed: trainer.export(directory, True, hashed),
        trainer.score,
        probe_tokens(VOCABULARY),
        trainer.send_weights,
        trainer.snapshot,
    )
    way = DiskWay(source, tmp_path, mode) if how == "disk" else SentWay(how, source, tmp_path, options)
    sync, before = WeightSync(way, source, [engine], options, patience=0.0), ask(engine, "/model_info")
    version, box = time.time_ns(), []
    sampling = {"max_new_tokens": 55, "ignore_eos": True}
    body = {"input_ids": [[3, 4, 5]] * 16, "sampling_params": sampling}
    thread = threading.Thread(target=lambda: box.extend(ask(engine, "/generate", body)))
    thread.start()
    while not ask(engine, "/v1/loads")["loads"][0]["num_running_reqs"] and thread.is_alive():
        time.sleep(0.01)
    metrics = sync.push(version)
    thread.join()
    sync.close()
    assert metrics["sync/checked_tensors"] == UNFUSED
    assert metrics["sync/probe_gap_max"] < 1e-4
    known = [str(before["weight_version"]), str(version)]
    for reply in box:
        meta = reply["meta_info"]
        spans = meta.get("weight_versions") or []
        assert [span["version"] for span in spans] in (known, known[:1], known[1:])
        assert [span["start"] for span in spans] == [0, *(span["end"] for span in spans[:-1])]
        assert meta["finish_reason"]["type"] == "length" or mode == "abort"
