"""The hashes of an engine's weights are those of the files, and weights that are not live are named."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_rollout.engines.local.errors import CheckpointError
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.weights import live_checksum

IMPLS = pytest.mark.parametrize("impl", ["lean", "hf"])


def expected(directory):
    """Hash as the trainer does, from its one sentence: SHA-256 over little-endian float32 values, 16 digits."""
    return {
        name: hashlib.sha256(tensor.float().numpy().astype("<f4").tobytes()).hexdigest()[:16]
        for name, tensor in load_file(directory / "model.safetensors").items()
    }


@IMPLS
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_live_weights_are_hashed_by_the_names_and_values_of_their_files(kit, impl, kind):
    directory = kit.directory(kind)
    assert live_checksum(load_model(directory, impl, None), directory) == (expected(directory), [])


@IMPLS
def test_half_precision_files_hash_as_the_float32_values_that_are_served(kit, impl, tmp_path):
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    file = tmp_path / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    assert live_checksum(load_model(tmp_path, impl, None), tmp_path) == (expected(tmp_path), [])


@IMPLS
def test_weights_that_were_not_put_in_place_are_named(kit, impl, tmp_path):
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path, impl, None)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"][3, 5] += 1e-3
    save_file(tensors, file, {"format": "pt"})
    model.stage(tmp_path)  # read, and never committed
    sums, stale = live_checksum(model, tmp_path)
    assert sums == expected(tmp_path)
    assert stale == ["layers.1.down" if impl == "lean" else "model.layers.1.mlp.down_proj.weight"]
    model.stage(tmp_path)()
    assert live_checksum(model, tmp_path)[1] == []


def test_weights_whose_files_are_gone_cannot_be_hashed(kit, tmp_path):
    shutil.copytree(kit.directory("qwen3"), tmp_path, dirs_exist_ok=True)
    model = load_model(tmp_path, "lean", None)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        live_checksum(model, tmp_path)


def test_a_changed_value_changes_one_hash(kit, tmp_path):
    directory = kit.directory("qwen3")
    before = expected(directory)
    shutil.copytree(directory, tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    value = tensors["model.norm.weight"][7:8]
    value.copy_(torch.nextafter(value, value + 1))
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    sums, _ = live_checksum(load_model(tmp_path, "lean", None), tmp_path)
    assert [name for name in sums if sums[name] != before[name]] == ["model.norm.weight"]
