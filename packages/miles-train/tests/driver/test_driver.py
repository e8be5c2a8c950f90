import json
import os
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.checks.check import derive
from miles_api.checks.derive import derive_batch
from miles_api.checks.run_checks import services_of
from miles_api.config import RunConfig
from miles_api.errors import ConfigError, DataError, ServiceError
from miles_api.run_options import RunOptions
from miles_api.services import Endpoint
from miles_train.driver import checkpoint
from miles_train.weight_sync import disk
from miles_train.weight_sync.disk import DiskWeightSync
from miles_train.weight_sync.fixed import FixedWeights

KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def derived(**knobs):
    run = derive_batch(RunConfig.of(RunOptions(**knobs))).group(RunOptions)
    return tuple(getattr(run, knob) for knob in KNOBS)


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 8), st.sampled_from(KNOBS))
def test_any_three_batch_knobs_give_the_fourth(prompts, group, steps, missing):
    whole = dict(zip(KNOBS, (prompts, group * steps, prompts * group, steps), strict=True))
    given_knobs = {knob: value for knob, value in whole.items() if knob != missing}
    assert derived(**given_knobs) == tuple(whole.values())


def test_one_step_and_one_sample_are_what_goes_without_saying():
    assert derived(rollout_batch_size=8, n_samples_per_prompt=4) == (8, 4, 32, 1)
    assert derived(rollout_batch_size=8) == (8, 1, 8, 1)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({}, "set --rollout-batch-size or --global-batch-size"),
        ({"rollout_batch_size": 3, "n_samples_per_prompt": 3, "num_steps_per_rollout": 2}, "is not a multiple of"),
        ({"rollout_batch_size": 2, "n_samples_per_prompt": 2, "global_batch_size": 3, "num_steps_per_rollout": 1},
         "batch sizes disagree"),
    ],
)  # fmt: skip
def test_batch_knobs_that_cannot_hold_are_refused(knobs, message):
    with pytest.raises(ConfigError, match=message):
        derived(**knobs)


def test_a_derived_value_says_so():
    config = derive_batch(RunConfig.of(RunOptions(rollout_batch_size=8, n_samples_per_prompt=4)))
    assert config.sources["global_batch_size"] == "derived"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, None),
        ({"loss_type": "sft_loss"}, "sft"),
        ({"load_debug_rollout_data": "/dump"}, "recorded"),
        ({"load_debug_rollout_data": "/dump", "loss_type": "sft_loss"}, "recorded"),
    ],
)
def test_a_run_that_samples_nothing_gets_the_rollout_function_that_reads(options, expected):
    config = derive(RunConfig.of(RunOptions(rollout_batch_size=8, **options)))
    assert config.args.rollout_function_path == expected


@pytest.mark.parametrize(
    ("options", "services"),
    [
        ({}, ("rollout", "engines", "router", "train")),
        ({"loss_type": "sft_loss"}, ("rollout", "train")),
        ({"load_debug_rollout_data": "/dump"}, ("rollout", "train")),
        ({"debug_rollout_only": True}, ("rollout", "engines", "router")),
    ],
)
def test_a_run_starts_what_it_needs_and_nothing_else(options, services):
    assert services_of(RunOptions(**options)) == services


def fill(text):
    return lambda folder: Path(folder, "file").write_text(text)


def test_a_checkpoint_is_found_with_all_its_parts(tmp_path):
    for rollout_id in (1, 2):
        checkpoint.write(tmp_path, checkpoint.Progress(rollout_id, rollout_id + 1), {"a": fill("x"), "b": fill("y")})
    folder, progress = checkpoint.find(tmp_path)
    assert (progress.rollout_id, progress.weight_version) == (2, 3)
    assert (folder / "b" / "file").read_text() == "y"
    assert checkpoint.find(tmp_path / "rollout_000001")[1].rollout_id == 1


def test_a_save_that_fails_leaves_the_last_checkpoint_as_it_was(tmp_path):
    checkpoint.write(tmp_path, checkpoint.Progress(1, 1), {"a": fill("good")})

    def full_disk(folder):
        raise OSError("No space left on device")

    with pytest.raises(OSError, match="No space"):
        checkpoint.write(tmp_path, checkpoint.Progress(2, 2), {"a": fill("half"), "b": full_disk})
    folder, progress = checkpoint.find(tmp_path)
    assert progress.rollout_id == 1
    assert (folder / "a" / "file").read_text() == "good"


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


@pytest.fixture
def engine():
    """Answers weight updates with what the test puts in `answer`; serves the version it was told, or `stuck_at`."""
    state = {"answer": (200, {"success": True}), "seen": [], "stuck_at": None}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            state["seen"].append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
            self.reply(*state["answer"])

        def do_GET(self):
            self.reply(200, {"weight_version": state["stuck_at"] or state["seen"][-1][1]["weight_version"]})

        def reply(self, status, content):
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args): ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    state["endpoint"] = Endpoint(url=f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def synchronise(engine, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    sync = DiskWeightSync(lambda target: Path(target, "model.safetensors").touch(), [engine["endpoint"]] * 2, folder)
    yield sync
    sync.close()
    assert not folder.exists()


def test_every_engine_is_told_directory_and_version(engine, synchronise, tmp_path):
    synchronise.push("7")
    body = {"model_path": str(tmp_path / "weights"), "weight_version": "7"}
    assert engine["seen"] == [("/update_weights_from_disk", body)] * 2


@pytest.mark.parametrize("answer", [(400, {"success": False, "message": "shape"}), (200, {"success": False})])
def test_an_engine_that_does_not_take_the_weights_stops_the_run(engine, synchronise, answer):
    engine["answer"] = answer
    with pytest.raises(ServiceError, match=r"refused /update_weights_from_disk"):
        synchronise.push("1")


def test_an_engine_that_still_serves_the_old_weights_stops_the_run(engine, synchronise):
    engine["stuck_at"] = "0"
    with pytest.raises(ServiceError, match="took weights '1' but says it serves '0'"):
        synchronise.push("1")


def test_an_engine_that_is_gone_is_named(tmp_path):
    sync = DiskWeightSync(lambda folder: None, [Endpoint(url="http://127.0.0.1:9")], tmp_path / "none")
    with pytest.raises(ServiceError, match=r"http://127\.0\.0\.1:9 did not answer"):
        sync.push("1")
    sync.close()


def test_weights_that_nobody_trains_are_known_by_what_the_engines_call_them(engine):
    engine["stuck_at"] = "default"
    fixed = FixedWeights([engine["endpoint"]] * 2)
    fixed.push("3")
    assert fixed.served("3") == "default"
    assert engine["seen"] == []


def test_weights_travel_in_memory_only_where_they_fit(tmp_path, monkeypatch):
    memory = tmp_path / "shm"
    memory.mkdir()
    monkeypatch.setattr(disk, "_SHARED_MEMORY", memory)
    free = shutil.disk_usage(memory).free
    assert disk.make_folder(1, None, fallback=tmp_path).parent == memory
    assert disk.make_folder(free, None, fallback=tmp_path).parent == tmp_path
    assert disk.make_folder(1, tmp_path, fallback=memory).parent == tmp_path


def test_what_a_killed_run_left_in_memory_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "_SHARED_MEMORY", tmp_path)
    dead = tmp_path / "miles-weights-999999999-abc"
    alive = tmp_path / f"miles-weights-{os.getpid()}-abc"
    dead.mkdir()
    alive.mkdir()
    disk.make_folder(1, None, fallback=tmp_path)
    assert not dead.exists()
    assert alive.exists()
