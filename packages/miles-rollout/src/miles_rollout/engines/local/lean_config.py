"""Which configurations the lean forward covers: every key must be known, or the model goes to transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from miles_rollout.engines.local.errors import UnsupportedModelError
from miles_rollout.engines.local.json_file import read_json

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["LeanConfig"]

_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
_NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "max_position_embeddings",
)
_HANDLED = {
    *_NEEDED,
    *("architectures", "model_type", "head_dim", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("rope_parameters", "rope_theta", "rope_scaling", "sliding_window", "use_sliding_window", "layer_types"),
    "quantization_config",
}
# Training-time, bookkeeping, or without a role in inference.
_HARMLESS = {
    *("torch_dtype", "dtype", "transformers_version", "bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
    *("initializer_range", "attention_dropout", "max_window_layers", "pretraining_tp", "_name_or_path", "name_or_path"),
    *(
        "output_attentions",
        "output_hidden_states",
        "return_dict",
        "torchscript",
        "id2label",
        "label2id",
        "problem_type",
    ),
    *("is_llama_config", "rope_interleaved", "transformers.js_config", "hidden_dropout", "chunk_size_feed_forward"),
    *("is_encoder_decoder", "unsloth_version", "unsloth_fixed", "auto_map", "bos_token", "eos_token"),
}
_ROPE_KEYS = {
    "default": {"rope_type", "type", "rope_theta"},
    "llama3": {
        *("rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor"),
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class LeanConfig:
    """The numbers the lean forward needs, all checked."""

    vocab_size: int
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    max_positions: int
    tied: bool
    qkv_bias: bool
    out_bias: bool
    qk_norm: bool
    rope: dict[str, Any]

    @classmethod
    def read(cls, directory: Path, max_total_len: int | None) -> LeanConfig:
        """Read and check `config.json`.

        Raises:
            UnsupportedModelError: the first key that changes the maths in a way not covered.
        """
        raw = read_json(directory / "config.json")
        _decline_unknown(raw)
        max_positions = min(max_total_len or raw["max_position_embeddings"], raw["max_position_embeddings"])
        _decline_windows(raw, max_positions)
        kind = raw["model_type"]
        default_head_dim = 128 if kind == "qwen3" else raw["hidden_size"] // raw["num_attention_heads"]
        biased = bool(raw.get("attention_bias", False)) and kind != "qwen2"
        return cls(
            vocab_size=raw["vocab_size"],
            hidden=raw["hidden_size"],
            ffn=raw["intermediate_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"],
            head_dim=raw.get("head_dim") or default_head_dim,
            eps=raw["rms_norm_eps"],
            max_positions=max_positions,
            tied=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=biased or kind == "qwen2",
            out_bias=biased,
            qk_norm=kind == "qwen3",
            rope=_rope(raw),
        )


def _decline(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the lean forward does not cover {reason}")


def _decline_unknown(raw: dict[str, Any]) -> None:
    kind = raw.get("model_type")
    if kind not in _ARCHITECTURES or raw.get("architectures") not in ([_ARCHITECTURES[kind]], None):
        raise _decline(f"model_type={kind!r}, architectures={raw.get('architectures')!r}")
    unknown = sorted(key for key in set(raw) - _HANDLED - _HARMLESS if raw[key] not in (None, False))
    if unknown:
        raise _decline(f"config key {unknown[0]}={raw[unknown[0]]!r}")
    missing = [key for key in _NEEDED if raw.get(key) is None]
    if missing:
        raise _decline(f"a config without {missing[0]}")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise _decline(f"hidden_act={raw['hidden_act']!r}")
    for key in ("mlp_bias", "quantization_config"):
        if raw.get(key):
            raise _decline(f"{key}={raw[key]!r}")


def _decline_windows(raw: dict[str, Any], max_positions: int) -> None:
    """A sliding window that no sequence can exceed changes nothing; any other is declined."""
    layers = set(raw.get("layer_types") or [])
    on = raw["model_type"] != "llama" and raw.get("use_sliding_window", False)
    if layers - {"full_attention", "sliding_attention"}:
        raise _decline(f"layer_types={sorted(layers)}")
    if (on or "sliding_attention" in layers) and (raw.get("sliding_window") or 0) < max_positions:
        window = raw.get("sliding_window")
        raise _decline(f"sliding_window={window!r} with sequences of up to {max_positions} tokens")


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.get("rope_type", rope.get("type", "default"))
    known = _ROPE_KEYS.get(rope["rope_type"])
    if known is None or set(rope) - known:
        raise _decline(f"RoPE parameters {rope}")
    return rope
