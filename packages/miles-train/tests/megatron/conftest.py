"""Tiny random models in Hugging Face format, and one Megatron process group per test module."""

from importlib import import_module

import pytest
import torch

SMALL = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128}  # fmt: skip
LLAMA_ROPE = {"rope_type": "default", "rope_theta": 5e5}


def save_model(kind: str, directory: str) -> None:
    """Write a random model whose norm weights are not all ones, so that mixing them up shows."""
    import transformers as tf

    configs = {
        "qwen3-tied": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 16, "tie_word_embeddings": True}),
        "qwen3-untied": (tf.Qwen3Config, tf.Qwen3ForCausalLM, {"head_dim": 8, "tie_word_embeddings": False}),
        "llama": (tf.LlamaConfig, tf.LlamaForCausalLM, {"rope_parameters": LLAMA_ROPE}),
        "qwen2": (tf.Qwen2Config, tf.Qwen2ForCausalLM, {}),
    }
    config, model, extra = configs[kind]
    torch.manual_seed(0)
    built = model(config(**SMALL, **extra))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    built.save_pretrained(directory)


@pytest.fixture(scope="session")
def hf_dir(tmp_path_factory):
    """Return the directory of a tiny model: `hf_dir("llama")`."""
    made = {}

    def make(kind: str) -> str:
        if kind not in made:
            made[kind] = str(tmp_path_factory.mktemp(kind))
            save_model(kind, made[kind])
        return made[kind]

    return make


@pytest.fixture(scope="module")
def megatron():
    """Start Megatron in this process, alone."""
    from miles_train.megatron import init
    from miles_train.options import ParallelOptions

    tiny = import_module("packages.miles-train.tests.tiny_trainer")
    init.initialize(ParallelOptions(), **tiny.meeting(), seed=1)
    yield
    init.shutdown()


@pytest.fixture(scope="session")
def sequences():
    """Return random sequences of the given lengths, the same every time."""

    def make(*lengths: int, seed: int = 3) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(0, SMALL["vocab_size"], (length,), generator=generator) for length in lengths]

    return make
