"""The Megatron model computes what transformers computes, packed or not."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from miles_api.errors import ConfigError, DataError
from miles_train.megatron import forward
from miles_train.megatron.hf_config import read_hf_config
from miles_train.megatron.model import build_model
from miles_train.options import ParallelOptions

KINDS = ["qwen3-tied", "qwen3-untied", "llama", "qwen2"]


def logits_of(model, sequences):
    [result] = forward.run(
        model, [{"tokens": sequences}], lambda logits, _: (None, {"logits": logits.clone()}), forward_only=True
    )
    return result["logits"]


@torch.no_grad()
def reference_logits(hf_dir, sequences):
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32)
    return torch.cat([model(input_ids=tokens[None]).logits[0] for tokens in sequences])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_equal_those_of_transformers_one_sequence_at_a_time(megatron, hf_dir, sequences, kind):
    ragged = sequences(5, 17, 1, 9)
    found = logits_of(build_model(hf_dir(kind), ParallelOptions()), ragged)
    torch.testing.assert_close(found, reference_logits(hf_dir(kind), ragged), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("lengths", [(6, 6, 6), (90, 2, 3, 2, 5, 4, 40), (1,)])
def test_packing_does_not_change_a_sequence_however_lengths_are_mixed(megatron, hf_dir, sequences, lengths):
    model = build_model(hf_dir("qwen3-tied"), ParallelOptions())
    packed = sequences(*lengths)
    alone = torch.cat([logits_of(model, [tokens]) for tokens in packed])
    torch.testing.assert_close(logits_of(model, packed), alone, atol=1e-5, rtol=1e-5)


def test_gradients_of_a_packed_micro_batch_are_those_of_its_sequences_one_by_one(megatron, hf_dir, sequences):
    model = build_model(hf_dir("qwen3-tied"), ParallelOptions())
    packed = sequences(30, 2, 7, 3, 4)

    def gradients(micro_batches):
        forward.run(model, micro_batches, lambda logits, _: (logits.square().sum(), {}), forward_only=False)
        return [parameter.main_grad.clone() for parameter in model[0].parameters()]

    together = gradients([{"tokens": packed}])
    one_by_one = gradients([{"tokens": [tokens]} for tokens in packed])
    for left, right in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(left, right, atol=1e-3, rtol=1e-4)


def test_results_come_back_in_the_order_of_the_micro_batches(megatron, hf_dir, sequences):
    model = build_model(hf_dir("qwen3-tied"), ParallelOptions())
    batches = [{"tokens": sequences(n), "name": n} for n in (4, 2, 3)]
    results = forward.run(
        model, batches, lambda logits, mb: (None, {"name": mb["name"], "rows": len(logits)}), forward_only=True
    )
    assert results == [{"name": n, "rows": n} for n in (4, 2, 3)]


def test_a_step_whose_loss_is_none_everywhere_leaves_zero_gradients(megatron, hf_dir, sequences):
    model = build_model(hf_dir("qwen3-tied"), ParallelOptions())
    forward.run(model, [{"tokens": sequences(4)}], lambda logits, _: (logits.sum(), {}), forward_only=False)
    forward.run(model, [{"tokens": sequences(4)}], lambda logits, _: (None, {}), forward_only=False)
    assert all(not parameter.main_grad.any() for parameter in model[0].parameters())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("architectures", ["Qwen3MoeForCausalLM"]),
        ("use_sliding_window", True),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        ("hidden_act", "gelu"),
        ("attention_bias", True),
    ],
)
def test_a_config_the_trainer_would_compute_wrongly_is_refused_naming_field_and_file(hf_dir, tmp_path, field, value):
    config = json.loads(Path(hf_dir("qwen3-tied"), "config.json").read_text())
    config.pop("rope_parameters")
    (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(ConfigError, match=field) as error:
        read_hf_config(tmp_path)
    assert str(tmp_path / "config.json") in str(error.value)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(DataError, match="not a Hugging Face model directory"):
        read_hf_config(tmp_path)


def test_a_model_that_tensor_parallel_ranks_cannot_share_is_refused(megatron, hf_dir):
    with pytest.raises(ConfigError, match="num_attention_heads = 4 cannot be divided"):
        build_model(hf_dir("llama"), ParallelOptions(tensor_model_parallel_size=3))


def changed_weights(source, target, change):
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors")
    return str(target)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "lack model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.update({"model.layers.9.extra": torch.ones(1)}), "no place for the weights model.layers.9.extra"),
        (lambda t: t.update({"model.norm.weight": torch.ones(7)}), r"model.norm.weight has shape \(7,\)"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_by_name(megatron, hf_dir, tmp_path, change, named):
    directory = changed_weights(hf_dir("qwen3-untied"), tmp_path / "model", change)
    with pytest.raises(DataError, match=named):
        build_model(directory, ParallelOptions())


def test_a_directory_with_a_config_but_no_weights_is_refused(megatron, hf_dir, tmp_path):
    shutil.copy(hf_dir("llama") + "/config.json", tmp_path)
    with pytest.raises(DataError, match=r"no \*\.safetensors"):
        build_model(str(tmp_path), ParallelOptions())
