"""A run that continues keeps the frozen models that it began with, wherever they lie."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from miles_api.errors import DataError
from miles_train.driver.checkpoint import State
from miles_train.driver.fingerprint import weights_fingerprint
from miles_train.driver.identity import changes, identity_of, mismatches, options_of
from miles_train.options import ModelsOptions, ObjectiveOptions, OptimizerOptions

make_config = import_module("packages.miles-train.tests.tiny_trainer").make_config
KL, OPD = ObjectiveOptions(use_kl_loss=True), ObjectiveOptions(use_opd=True)
LARGE = 50_000


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {"embed": torch.randn(LARGE, generator=generator), "norm": torch.randn(8, generator=generator)}


@pytest.fixture
def model(tmp_path):
    """Return a function that writes a model directory, its weights in one file or in one each."""

    def make(name, weights=None, split=False):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
        weights = tensors() if weights is None else weights
        files = {key: {key: value} for key, value in weights.items()} if split else {"model": weights}
        for file, content in files.items():
            save_file(content, folder / f"{file}.safetensors", {"format": "pt"})
        return str(folder)

    return make


def configure(hf_dir, *options):
    return make_config(hf_dir, OptimizerOptions(), *options, load_debug_rollout_data="rollouts.miles")


def saved_by(config, **identity):
    found = {key: value for key, value in (identity_of(config) | identity).items() if value is not None}
    return State(rollout_id=3, weight_version=4, identity=found, options=options_of(config))


def refused(state, config):
    return list(mismatches(state, config, Path("saved")))


def test_a_trained_model_does_not_become_the_reference_of_the_run_that_continues(model):
    base, trained = model("base"), model("trained", tensors(seed=1))
    state = saved_by(configure(base, KL))
    (text,) = refused(state, configure(trained, KL))
    assert f"checkpoint saved was saved with reference {base} (weights " in text
    assert f"this run has reference {trained} (weights " in text
    assert text.endswith("pass --ref-load with the directory that the run began from")
    assert refused(state, configure(trained, KL, ModelsOptions(ref_load=base))) == []


def test_another_teacher_is_refused_and_named(model):
    base, first, second = model("base"), model("first", tensors(1)), model("second", tensors(2))
    state = saved_by(configure(base, OPD, ModelsOptions(opd_teacher_load=first)))
    (text,) = refused(state, configure(base, OPD, ModelsOptions(opd_teacher_load=second)))
    assert f"saved with teacher {first} (weights " in text
    assert f"this run has teacher {second} (weights " in text
    assert text.endswith("pass --opd-teacher-load with the directory that the run began with")


def test_a_frozen_model_may_move_and_a_run_may_do_without_it(model, tmp_path):
    base = model("base")
    state = saved_by(configure(base, KL))
    moved = str(shutil.copytree(base, tmp_path / "moved"))
    now = configure(base, KL, ModelsOptions(ref_load=moved))
    assert refused(state, now) == []
    assert not [text for text in changes(state, now) if "ref" in text]
    assert refused(state, configure(model("trained", tensors(1)))) == []


def test_a_checkpoint_that_does_not_say_its_reference_continues_and_the_plan_says_so(model):
    base, trained = model("base"), model("trained", tensors(1))
    older = saved_by(configure(base, KL), reference=None)
    now = configure(trained, KL)
    assert refused(older, now) == []
    (text,) = [text for text in changes(older, now) if "reference" in text]
    assert f"does not say which reference its run had, if any: this run has {trained} (--hf-checkpoint)" in text
    assert "pass --ref-load with that" in text


@pytest.mark.parametrize(("name", "place"), [("embed", 0), ("embed", LARGE // 2), ("embed", -1), ("norm", 5)])
def test_a_fingerprint_sees_what_any_tensor_holds_and_not_how_files_are_cut(model, name, place):
    other = tensors()
    other[name][place] += 1
    assert weights_fingerprint(model("one")) == weights_fingerprint(model("several", split=True))
    assert weights_fingerprint(model("other", other)) != weights_fingerprint(model("again"))


def test_a_fingerprint_sees_shapes_and_a_file_that_is_none_is_an_error_with_its_path(model):
    shaped = tensors() | {"norm": tensors()["norm"].reshape(2, 4)}
    assert weights_fingerprint(model("one")) != weights_fingerprint(model("shaped", shaped))
    broken = model("broken")
    Path(broken, "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"no json!")
    with pytest.raises(DataError, match=r"broken/model\.safetensors cannot be read as safetensors"):
        weights_fingerprint(broken)
