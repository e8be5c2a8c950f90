"""Weights leave as they came, and transformers reads them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from miles_train.megatron import forward
from miles_train.megatron.hf import export_hf, named_hf_tensors
from miles_train.megatron.model import build_model
from miles_train.megatron.optimizer import build_optimizer
from miles_train.options import OptimizerOptions, ParallelOptions

KINDS = ["qwen3-tied", "qwen3-untied", "llama", "qwen2"]


@pytest.mark.parametrize("kind", KINDS)
def test_export_of_a_loaded_model_is_bitwise_the_source(megatron, hf_dir, tmp_path, kind):
    export_hf(build_model(hf_dir(kind), ParallelOptions()), hf_dir(kind), str(tmp_path / "out"))
    source = load_file(hf_dir(kind) + "/model.safetensors")
    exported = load_file(tmp_path / "out/model.safetensors")
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) for name in source)


@pytest.mark.parametrize("kind", ["qwen3-tied", "qwen3-untied"])
def test_transformers_computes_with_an_export_what_the_trained_model_computes(
    megatron, hf_dir, sequences, tmp_path, kind
):
    model = build_model(hf_dir(kind), ParallelOptions())
    optimizer = build_optimizer(model, OptimizerOptions(lr=1e-2), ParallelOptions(), total_steps=2)
    batch = {"tokens": sequences(4, 9)}
    forward.run(model, [batch], lambda logits, _: (logits[:, 3].sum(), {}), forward_only=False)
    optimizer.step()
    export_hf(model, hf_dir(kind), str(tmp_path), extra_files=False)
    [result] = forward.run(model, [batch], lambda logits, _: (None, {"logits": logits}), forward_only=True)
    reference = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = torch.cat([reference(input_ids=tokens[None]).logits[0] for tokens in batch["tokens"]])
    torch.testing.assert_close(result["logits"], expected.detach(), atol=2e-5, rtol=1e-5)


def test_the_tokenizer_goes_along_and_weights_of_another_format_stay_behind(megatron, hf_dir, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in Path(hf_dir("qwen3-tied")).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "tokenizer.json").write_text("{}")
    (source / "pytorch_model.bin").write_text("old weights")
    model = build_model(str(source), ParallelOptions())
    export_hf(model, str(source), str(tmp_path / "full"))
    export_hf(model, str(source), str(tmp_path / "weights"), extra_files=False)
    assert (tmp_path / "full/tokenizer.json").exists()
    assert not (tmp_path / "full/pytorch_model.bin").exists()
    assert sorted(path.name for path in (tmp_path / "weights").iterdir()) == ["config.json", "model.safetensors"]


def test_an_exported_config_states_the_dtype_of_the_exported_weights(megatron, hf_dir, tmp_path):
    model = build_model(hf_dir("llama"), ParallelOptions(), param_dtype=torch.bfloat16)
    export_hf(model, hf_dir("llama"), str(tmp_path), extra_files=False)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert load_file(tmp_path / "model.safetensors")["model.norm.weight"].dtype == torch.bfloat16


def test_tied_weights_are_named_once(megatron, hf_dir):
    names = [name for name, _ in named_hf_tensors(build_model(hf_dir("qwen3-tied"), ParallelOptions()))]
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names
