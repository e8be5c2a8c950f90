from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from miles_rollout.engines.local.jobs import Job
from miles_rollout.engines.local.model import load_model
from miles_rollout.engines.local.scheduler import Limits, Scheduler
from miles_rollout.engines.local.tokenizer import TextCodec

CHARACTERS = "0123456789> abcdefghijklmnopqrstuvwxyz"
VOCABULARY = {token: index for index, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
SMALL = {
    "vocab_size": len(VOCABULARY),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "eos_token_id": 1,
    "pad_token_id": 0,
    # Large enough that the tiny models prefer some tokens clearly.
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def build(kind: str):
    if kind == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=True))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**SMALL, tie_word_embeddings=False))
    if kind == "wide":
        # A vocabulary scanned in chunks, the last one cut short; all query heads on one key/value head.
        shape = {"vocab_size": 1234, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 512}
        return LlamaForCausalLM(LlamaConfig(**{**SMALL, **shape}, tie_word_embeddings=False))
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SMALL, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE, attention_bias=True, rms_norm_eps=1e-5))


def save(kind: str, directory, seed: int = 0):
    torch.manual_seed(seed)
    model = build(kind)
    for name, parameter in model.named_parameters():
        # Norm weights of 1 and biases of 0 would hide that they are misplaced.
        if "norm" in name or "bias" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    model.save_pretrained(directory)
    backend = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def kit(tmp_path_factory):
    """Tiny models on disk by kind (`qwen3`, `qwen2`, `llama`, `llama3`, `wide`), and what tests do with them."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    references, directories = {}, {}

    def directory(kind: str, seed: int = 0):
        if (kind, seed) not in directories:
            directories[kind, seed] = save(kind, root / f"{kind}-{seed}", seed)
        return directories[kind, seed]

    def reference(kind: str, seed: int = 0):
        if (kind, seed) not in references:
            loaded = AutoModelForCausalLM.from_pretrained(directory(kind, seed), dtype=torch.float32)
            references[kind, seed] = loaded.eval()
        return references[kind, seed]

    def scheduler(kind: str = "qwen3", impl: str = "auto", seed: int = 0, deterministic: bool = False, **limits):
        path = directory(kind, seed)
        model = load_model(path, impl, None, deterministic=deterministic)
        return Scheduler(model, TextCodec(path), Limits(**limits))

    return SimpleNamespace(directory=directory, reference=reference, scheduler=scheduler, save=save, root=root)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


@pytest.fixture
def make_job():
    def make(ids, rid="r", **fields):
        return Job(rid=rid, ids=list(ids), **{"max_new_tokens": 8, "temperature": 0.0, **fields})

    return make


@pytest.fixture
def drain():
    def run(scheduler, *jobs):
        for job in jobs:
            scheduler.add(job)
        finished = []
        for _ in range(10_000):
            if not scheduler.busy:
                return finished
            finished += scheduler.step().finished
        raise AssertionError("the scheduler did not finish")

    return run


@pytest.fixture
def prompts():
    """Prompts of mixed lengths."""
    generator = torch.Generator().manual_seed(7)
    lengths = (5, 1, 17, 9, 30, 2, 12)
    return [torch.randint(3, len(VOCABULARY), (n,), generator=generator).tolist() for n in lengths]
