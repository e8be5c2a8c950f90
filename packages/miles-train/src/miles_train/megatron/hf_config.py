"""Read a Hugging Face config.json, and refuse what the trainer would compute wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:
    from miles_train.options import ParallelOptions

__all__ = ["HFConfig", "check_sizes", "parse_hf_config", "read_hf_config", "read_raw_config"]

_ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
_NOT_SUPPORTED: dict[str, tuple[Any, ...]] = {
    # field: the values (besides absence) with which the plain dense model is what the config describes
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "attention_dropout": (0, 0.0, None),
    "partial_rotary_factor": (1, 1.0, None),
    "quantization_config": (None,),
    "num_experts": (0, None),
    "num_local_experts": (0, None),
}


class HFConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a dense decoder that the trainer needs."""

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    tied: bool
    """Whether the output layer is the embedding's weight."""
    qk_norm: bool
    """Whether queries and keys are normalised per head (Qwen3)."""
    qkv_bias: bool
    """Whether the q, k and v projections have a bias (Qwen2)."""


def read_hf_config(hf_dir: str | Path) -> HFConfig:
    """Read `hf_dir/config.json`.

    Raises DataError when the file is missing or malformed and ConfigError, naming the field and the file, when it
    describes a model that the trainer does not build.
    """
    return parse_hf_config(read_raw_config(hf_dir), str(Path(hf_dir) / "config.json"))


def parse_hf_config(raw: dict[str, Any], path: str = "config.json") -> HFConfig:
    """Return the numbers in a Hugging Face config; `path` names it in errors, which are those of `read_hf_config`."""
    architecture = (raw.get("architectures") or ["nothing"])[0]
    if architecture not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: architectures: {architecture} is not supported{did_you_mean(architecture, _ARCHITECTURES)}; "
            f"the trainer builds {', '.join(_ARCHITECTURES)}"
        )
    _refuse_unsupported(path, raw)
    try:
        return _parse(architecture, raw, _rope_theta(path, raw))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: missing or malformed: {error}") from error


def read_raw_config(hf_dir: str | Path) -> dict[str, Any]:
    """Return `hf_dir/config.json` as it is; raises DataError when it is missing or no JSON object."""
    path = Path(hf_dir) / "config.json"
    try:
        raw = msgspec.json.decode(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path.parent} is not a Hugging Face model directory: {error}") from error
    except msgspec.DecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise DataError(f"{path}: expected a JSON object")
    return raw


def _refuse_unsupported(path: str, raw: dict[str, Any]) -> None:
    for field, allowed in _NOT_SUPPORTED.items():
        if field in raw and raw[field] not in allowed:
            raise ConfigError(f"{path}: {field} = {raw[field]!r} is not supported; it must be {allowed[0]!r} or absent")
    kinds = sorted(set(raw.get("layer_types") or []) - {"full_attention"})
    if kinds:
        raise ConfigError(f"{path}: layer_types: {', '.join(kinds)} is not supported, only full_attention")


def _rope_theta(path: str, raw: dict[str, Any]) -> float:
    # transformers 5 writes rope_parameters; before, there were rope_theta and rope_scaling
    for field in ("rope_parameters", "rope_scaling"):
        rope = raw.get(field) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise ConfigError(f"{path}: {field}: rope type {kind!r} is not supported, only 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise ConfigError(f"{path}: {field}: partial_rotary_factor is not supported")
        if "rope_theta" in rope:
            return float(rope["rope_theta"])
    return float(raw.get("rope_theta", 10000.0))


def _parse(architecture: str, raw: dict[str, Any], rope_theta: float) -> HFConfig:
    heads = int(raw["num_attention_heads"])
    return HFConfig(
        architecture=architecture,
        num_layers=int(raw["num_hidden_layers"]),
        hidden_size=int(raw["hidden_size"]),
        ffn_hidden_size=int(raw["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(raw.get("num_key_value_heads") or heads),
        head_dim=int(raw.get("head_dim") or int(raw["hidden_size"]) // heads),
        vocab_size=int(raw["vocab_size"]),
        max_positions=int(raw["max_position_embeddings"]),
        rms_norm_eps=float(raw["rms_norm_eps"]),
        rope_theta=rope_theta,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qk_norm=architecture == "Qwen3ForCausalLM",
        qkv_bias=architecture == "Qwen2ForCausalLM",
    )


def check_sizes(hf_config: HFConfig, parallel: ParallelOptions, hf_dir: str) -> None:
    """Raise ConfigError, naming field and flag, unless the model can be divided over TP and PP ranks."""
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    divided = {"num_attention_heads": (hf_config.num_heads, tensor), "vocab_size": (hf_config.vocab_size, tensor),
               "num_key_value_heads": (hf_config.num_kv_heads, tensor),
               "intermediate_size": (hf_config.ffn_hidden_size, tensor),
               "num_hidden_layers": (hf_config.num_layers, pipeline)}  # fmt: skip
    for field, (size, ranks) in divided.items():
        if size % ranks:
            kind = "pipeline" if field == "num_hidden_layers" else "tensor"
            raise ConfigError(
                f"{hf_dir}/config.json: {field} = {size} cannot be divided over "
                f"--{kind}-model-parallel-size {ranks} ranks"
            )
