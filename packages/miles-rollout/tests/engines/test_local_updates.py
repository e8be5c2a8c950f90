"""Weights that are sent arrive as a whole or not at all, within a session, and from messages that can call nothing."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import pickle
import shutil
import sys
import threading
from contextlib import contextmanager
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file

from miles_rollout.engines.local import update
from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.unpack import unpack
from miles_rollout.engines.local.update import WeightUpdates
from miles_rollout.engines.local.weights import live_checksum


@contextmanager
def named_memory():
    before = mp.get_sharing_strategy()
    mp.set_sharing_strategy("file_system")
    yield
    mp.set_sharing_strategy(before)


def serialized(content):
    buffer = io.BytesIO()
    with named_memory():
        ForkingPickler(buffer).dump(content)
    return base64.b64encode(buffer.getvalue()).decode()


def listed(tensors):
    """SGLang's message without a load format."""
    return serialized([(name, tensor.clone()) for name, tensor in tensors.items()])


def flattened(tensors, **changes):
    entries, start = [], 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        entry = {"name": name, "shape": tensor.shape, "dtype": tensor.dtype, "start_idx": start, "end_idx": end}
        entries.append(SimpleNamespace(**entry | {"numel": tensor.nbytes} | changes))
        start = end
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors.values()])
    return serialized({"flattened_tensor": flat, "metadata": entries})


class Updated:
    """The update endpoints of a model, without a server."""

    def __init__(self, directory, impl="lean"):
        self.model, self.source, self.version = load_model(directory, impl, None), directory, "default"
        self.updates = WeightUpdates(self.model, lambda: self.source, self.put, asyncio.Lock())

    async def put(self, commit, weights, version, aborts):
        commit()
        self.source, self.version = weights, version

    def ask(self, name, **body):
        status, answer = asyncio.run(getattr(self.updates, name)(json.dumps(body).encode()))
        assert (status == 200) == answer["success"]
        return "" if answer["success"] else answer["message"]

    def send(self, *messages, load_format=None):
        assert self.ask("begin") == ""
        for message in messages:
            body = {"serialized_named_tensors": [message], "weight_version": "5", "load_format": load_format}
            if problem := self.ask("from_tensor", **body):
                return problem
        return self.ask("end")

    def sums(self):
        return live_checksum(self.model, self.source)


@pytest.fixture
def others(kit):
    return load_file(kit.directory("qwen3", seed=1) / "model.safetensors")


def test_an_update_outside_a_session_is_refused_and_so_is_a_session_within_one(kit, others):
    engine = Updated(kit.directory("qwen3"))
    assert "between begin_weight_update() and end_weight_update()" in engine.ask(
        "from_tensor", serialized_named_tensors=[listed(others)]
    )
    names = {"names": [], "dtypes": [], "shapes": []}
    assert "between begin_weight_update()" in engine.ask("from_distributed", **names)
    assert "no weight-update session is open" in engine.ask("end")
    assert engine.ask("begin") == ""
    assert "already open" in engine.ask("begin")
    assert "does not exist" in engine.ask("from_distributed", **names)


@pytest.mark.parametrize("impl", ["lean", "hf"])
@pytest.mark.parametrize("pack", [listed, flattened])
def test_sent_weights_are_those_of_a_directory_that_holds_them(kit, others, impl, pack):
    engine, fresh = Updated(kit.directory("qwen3"), impl), Updated(kit.directory("qwen3", seed=1), impl)
    items = list(others.items())
    parts = [pack(dict(items[:7])), pack(dict(items[7:]))]
    assert engine.send(*parts, load_format="flattened_bucket" if pack is flattened else None) == ""
    assert engine.version == "5"
    assert engine.sums() == fresh.sums()
    expected = fresh.model.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in engine.model.tensors().items())


def test_the_end_of_a_session_finds_everything_ready(kit, others, monkeypatch):
    engine, fresh = Updated(kit.directory("qwen3")), Updated(kit.directory("qwen3", seed=1))
    before = engine.sums()
    assert engine.ask("begin") == ""
    items = list(others.items())
    assert engine.ask("from_tensor", serialized_named_tensors=[listed(dict(items[:7]))]) == ""
    last = {"serialized_named_tensors": [listed(dict(items[7:]))], "weight_version": "5"}
    assert engine.ask("from_tensor", **last) == ""
    assert engine.sums() == before
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "stage", lambda weights: pytest.fail("it is staged while requests wait"))
        assert engine.ask("end") == ""
    assert (engine.sums(), engine.version) == (fresh.sums(), "5")


def test_a_session_that_is_opened_anew_forgets_what_the_last_one_got(kit, others):
    engine = Updated(kit.directory("qwen3"))
    before = engine.sums()
    assert engine.ask("begin") == ""
    half = dict(list(others.items())[:7])
    assert engine.ask("from_tensor", serialized_named_tensors=[listed(half)]) == ""
    assert engine.ask("begin", anew=True) == ""
    assert engine.ask("end") == ""
    assert (engine.sums(), engine.version) == (before, "default")


def test_the_end_of_a_session_waits_for_what_is_still_being_read(kit, others, monkeypatch):
    engine, fresh = Updated(kit.directory("qwen3")), Updated(kit.directory("qwen3", seed=1))
    reading, go_on = threading.Event(), threading.Event()

    def slowly(*arguments):
        reading.set()
        assert go_on.wait(20)
        return unpack(*arguments)

    async def scenario():
        updates = engine.updates
        await updates.begin(b"{}")
        monkeypatch.setattr(update, "unpack", slowly)
        body = {"serialized_named_tensors": [listed(others)], "weight_version": "5"}
        sent = asyncio.create_task(updates.from_tensor(json.dumps(body).encode()))
        await asyncio.to_thread(reading.wait, 20)
        ended = asyncio.create_task(updates.end(b"{}"))
        await asyncio.sleep(0)
        go_on.set()
        return [status for status, _ in await asyncio.gather(sent, ended)]

    assert asyncio.run(scenario()) == [200, 200]
    assert (engine.sums(), engine.version) == (fresh.sums(), "5")


def test_what_comes_after_the_version_still_counts(kit, others):
    engine, fresh = Updated(kit.directory("qwen3")), Updated(kit.directory("qwen3", seed=1))
    wrong, right = torch.zeros(32), others["model.norm.weight"]
    assert engine.ask("begin") == ""
    first = {"serialized_named_tensors": [listed(others | {"model.norm.weight": wrong})], "weight_version": "5"}
    assert engine.ask("from_tensor", **first) == ""
    assert engine.ask("from_tensor", serialized_named_tensors=[listed({"model.norm.weight": right})]) == ""
    assert engine.ask("end") == ""
    assert engine.sums() == fresh.sums()


def test_tensors_that_are_not_sent_stay_as_they_are(kit, others):
    engine = Updated(kit.directory("qwen3"))
    before, name = engine.sums()[0], "model.layers.1.mlp.down_proj.weight"
    assert engine.send(listed({name: others[name]})) == ""
    after, stale = engine.sums()
    assert stale == []
    assert [each for each in after if after[each] != before[each]] == [name]
    assert engine.send(listed({"model.norm.weight": others["model.norm.weight"]})) == ""
    assert engine.sums()[0][name] == after[name]


def test_all_weights_may_be_sent_when_the_files_of_the_old_ones_are_gone(kit, others, tmp_path):
    shutil.copytree(kit.directory("qwen3"), tmp_path / "model")
    engine = Updated(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    few = dict(list(others.items())[:2])
    assert "tensors are missing" in engine.send(flattened(few), load_format="flattened_bucket")
    assert engine.send(flattened(others), load_format="flattened_bucket") == ""
    assert engine.sums() == Updated(kit.directory("qwen3", seed=1)).sums()


@pytest.mark.parametrize("impl", ["lean", "hf"])
@pytest.mark.parametrize(
    ("name", "tensor", "problem"),
    [
        ("model.norm.weight", torch.zeros(3), "norm.weight"),
        ("model.extra.weight", torch.zeros(3), "extra.weight"),
        ("model.norm.weight", torch.zeros(32, dtype=torch.int64), "int64"),
    ],
)
def test_weights_that_do_not_fit_change_nothing_and_end_the_session(kit, others, name, tensor, problem, impl):
    engine = Updated(kit.directory("qwen3"), impl)
    before = {key: value.clone() for key, value in engine.model.tensors().items()}
    message = engine.send(flattened({**others, name: tensor}), load_format="flattened_bucket")
    assert problem in message
    assert all(torch.equal(value, before[key]) for key, value in engine.model.tensors().items())
    assert engine.version == "default"


class Calls:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.mkdir, ("{path}",), "posix.mkdir"),
        (eval, ("1",), "builtins.eval"),
        (getattr, ("a", "b"), "builtins.getattr"),
    ],
)
def test_a_message_that_calls_something_is_refused_and_calls_nothing(tmp_path, function, arguments, named):
    made = tmp_path / "made"
    arguments = [argument.format(path=made) for argument in arguments]
    for content in (Calls(function, *arguments), [("a", Calls(function, *arguments))]):
        message = base64.b64encode(pickle.dumps(content)).decode()
        with pytest.raises(CheckpointError, match=f"may not name {named}"):
            unpack([message], None)
    assert not made.exists()


@pytest.mark.parametrize(
    ("where", "name"), [("torch.storage", "UntypedStorage"), ("torch.multiprocessing.reductions", "rebuild_tensor")]
)
def test_a_message_cannot_change_what_it_names(where, name):
    # The opcodes of: take this name, and set its attribute "changed" to 1.
    message = f"c{where}\n{name}\n(N}}Vchanged\nI1\nstb.".encode()
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack([base64.b64encode(message).decode()], None)
    assert not hasattr(getattr(sys.modules[where], name), "changed")


def test_shared_memory_that_is_not_torchs_own_is_refused():
    class Storage:
        def __reduce__(self):
            from torch.multiprocessing.reductions import rebuild_storage_filename

            return rebuild_storage_filename, (torch.UntypedStorage, b"/tmp/manager.sock", b"/../etc/passwd", 8)

    with pytest.raises(CheckpointError, match="no shared memory of torch"):
        unpack([base64.b64encode(pickle.dumps(Storage())).decode()], None)


@pytest.mark.parametrize("message", ["", "no base 64", base64.b64encode(b"\x80\x04junk").decode()])
def test_a_damaged_message_is_refused(message):
    with pytest.raises(CheckpointError, match="cannot be read"):
        unpack([message], None)
    with pytest.raises(CheckpointError, match="is empty"):
        unpack([], None)


@pytest.mark.parametrize("changes", [{"start_idx": -4}, {"end_idx": 1 << 40}, {"shape": (7,)}])
def test_a_bucket_whose_places_are_not_in_it_is_refused(changes):
    with pytest.raises(CheckpointError, match="of its bucket"):
        unpack([flattened({"a": torch.zeros(3)}, **changes)], "flattened_bucket")


@pytest.mark.parametrize("load_format", [None, "flattened_bucket"])
def test_a_tensor_is_a_copy_because_its_sender_writes_the_next_one_there(load_format):
    with named_memory():
        tensor = torch.zeros(3).share_memory_()
    place = SimpleNamespace(name="a", shape=(3,), dtype=torch.float32, start_idx=0, end_idx=12, numel=12)
    bucket = {"flattened_tensor": tensor.view(torch.uint8), "metadata": [place]}
    message = serialized(bucket if load_format else [("a", tensor)])
    got = unpack([message], load_format)["a"]
    tensor.fill_(1)
    assert got.tolist() == [0, 0, 0]
