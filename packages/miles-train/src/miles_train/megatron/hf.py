"""Weights between Megatron's model and a Hugging Face directory; the one place that knows both namings.

Megatron fuses q, k and v of each key/value group, and gate and up, and splits some tensors over tensor-parallel ranks.
"""

# ruff: noqa: N806  the shape suffixes
# G key/value heads of this rank, R query heads per key/value head, D head size, I input size

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from miles_api.checksum import checksums
from miles_api.errors import ConfigError, DataError

from .core import DistributedDataParallel, parallel_state, unwrap

__all__ = ["export_hf", "load_hf_weights", "named_hf_tensors"]

_Split = Callable[[Tensor, Any], list[Tensor]]
_Join = Callable[[list[Tensor], Any], Tensor]


class _Rule(msgspec.Struct, frozen=True):
    """How one Megatron parameter maps to Hugging Face tensors."""

    suffix: str
    names: tuple[str, ...]
    shard_dim: int | None = None
    """Dimension split over tensor-parallel ranks, the same on both sides; None: replicated."""
    split: _Split = lambda tensor, _config: [tensor]
    join: _Join = lambda tensors, _config: tensors[0]


def _split_qkv(fused: Tensor, config: Any) -> list[Tensor]:
    dim, per_group = config.kv_channels, config.num_attention_heads // config.num_query_groups
    grouped_GDI = fused.view(-1, (per_group + 2) * dim, *fused.shape[1:])
    parts = grouped_GDI.split([per_group * dim, dim, dim], dim=1)
    return [part.reshape(-1, *fused.shape[1:]) for part in parts]


def _join_qkv(parts: list[Tensor], config: Any) -> Tensor:
    dim, per_group = config.kv_channels, config.num_attention_heads // config.num_query_groups
    sizes = (per_group * dim, dim, dim)
    grouped = [part.view(-1, size, *part.shape[1:]) for part, size in zip(parts, sizes, strict=True)]
    return torch.cat(grouped, dim=1).reshape(-1, *parts[0].shape[1:])


def _split_gate_up(fused: Tensor, _config: Any) -> list[Tensor]:
    return list(fused.chunk(2, dim=0))


def _join_gate_up(parts: list[Tensor], _config: Any) -> Tensor:
    return torch.cat(parts, dim=0)


_QKV = tuple(f"self_attn.{x}_proj" for x in "qkv")
_LAYER_RULES = (
    _Rule("input_layernorm.weight", ("input_layernorm.weight",)),
    # Transformer Engine fuses a norm into the linear layer after it and names its weight there
    _Rule("self_attention.linear_qkv.layer_norm_weight", ("input_layernorm.weight",)),
    _Rule("self_attention.linear_qkv.weight", tuple(f"{x}.weight" for x in _QKV), 0, _split_qkv, _join_qkv),
    _Rule("self_attention.linear_qkv.bias", tuple(f"{x}.bias" for x in _QKV), 0, _split_qkv, _join_qkv),
    _Rule("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    _Rule("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
    _Rule("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), 1),
    _Rule("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",)),
    _Rule("mlp.linear_fc1.layer_norm_weight", ("post_attention_layernorm.weight",)),
    _Rule("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), 0, _split_gate_up, _join_gate_up),
    _Rule("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), 1),
)
_OTHER_RULES = (
    _Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), 0),
    _Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
    _Rule("output_layer.weight", ("lm_head.weight",), 0),
)
_BY_SUFFIX = {rule.suffix: rule for rule in (*_LAYER_RULES, *_OTHER_RULES)}
_IGNORED = ("rotary_emb.inv_freq",)


def _mapped(gpt: Any) -> Iterator[tuple[_Rule, tuple[str, ...], torch.nn.Parameter]]:
    """Yield each parameter of this rank with its rule and its full Hugging Face names."""
    for name, parameter in gpt.named_parameters():
        if name.startswith("decoder.layers."):
            _, _, index, suffix = name.split(".", 3)
            # the module's own number is global, its place in the list is local to the pipeline stage
            prefix = f"model.layers.{gpt.decoder.layers[int(index)].layer_number - 1}."
        else:
            prefix, suffix = "", name
        if suffix not in _BY_SUFFIX:
            raise ConfigError(
                f"the model has a parameter {name}, for which a Hugging Face checkpoint has no place: it could be "
                "trained but neither loaded nor exported to the engines"
            )
        rule = _BY_SUFFIX[suffix]
        names = tuple(prefix + hf_name for hf_name in rule.names)
        if names == ("lm_head.weight",) and gpt.share_embeddings_and_output_weights:
            # the last stage of a pipeline holds a copy of the tied embedding
            names = ("model.embed_tokens.weight",)
        yield rule, names, parameter


@torch.no_grad()
def load_hf_weights(model: Sequence[torch.nn.Module], hf_dir: str) -> None:
    """Copy the weights in `hf_dir`'s safetensors files into the model, cast to its dtype.

    `model` holds a GPTModel or what wraps it. Every rank reads only its own shards. Call before the optimizer is built,
    which copies the weights it finds. Raises
    DataError naming the tensors that are missing, have another shape, or (checked on all ranks of a run without
    pipeline stages) belong to no parameter.
    """
    gpt = unwrap(model)
    reader = _Reader(hf_dir)
    rules = list(_mapped(gpt))
    missing = sorted({name for _, names, _ in rules for name in names} - reader.names)
    if missing:
        raise DataError(f"{hf_dir}: weights lack {_listed(missing)}")
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        known = {name for _, names, _ in rules for name in names}
        tied = {"lm_head.weight"} if gpt.share_embeddings_and_output_weights else set()
        unexpected = sorted(n for n in reader.names - known - tied if not n.endswith(_IGNORED))
        if unexpected:
            raise DataError(f"{hf_dir}: the model has no place for the weights {_listed(unexpected)}")
    size, rank = _tensor_parallel()
    for rule, names, parameter in rules:
        parts = [reader.read(name, rule.shard_dim, rank, size) for name in names]
        shapes = [tuple(part.shape) for part in rule.split(parameter, gpt.config)]
        for name, part, shape in zip(names, parts, shapes, strict=True):
            if tuple(part.shape) != shape:
                where = f" on each of {size} tensor-parallel ranks" if size > 1 else ""
                raise DataError(f"{hf_dir}: {name} has shape {tuple(part.shape)}, config.json says {shape}{where}")
        parameter.copy_(rule.join(parts, gpt.config))


@torch.no_grad()
def named_hf_tensors(model: list[DistributedDataParallel]) -> Iterator[tuple[str, Tensor]]:
    """Yield each weight of this pipeline stage under its Hugging Face name, whole and in the model's dtype.

    A collective when tensor parallelism is on: every rank must iterate, and every rank gets the whole tensors. A
    tensor may share memory with the model's: copy it before the next optimizer step if you keep it.
    """
    gpt = unwrap(model)
    size, _ = _tensor_parallel()
    for rule, names, parameter in _mapped(gpt):
        if names == ("model.embed_tokens.weight",) and not gpt.pre_process:
            continue
        for name, part in zip(names, rule.split(parameter.detach(), gpt.config), strict=True):
            if rule.shard_dim is None or size == 1:
                yield name, part
                continue
            shards = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size)]
            dist.all_gather(shards, part.contiguous(), group=parallel_state.get_tensor_model_parallel_group())
            yield name, torch.cat(shards, dim=rule.shard_dim)


def export_hf(
    model: list[DistributedDataParallel],
    hf_source_dir: str,
    out_dir: str,
    *,
    extra_files: bool = True,
    with_checksums: bool = False,
) -> dict[str, str]:
    """Write the model as a Hugging Face directory, readable by transformers and by engines.

    `config.json` (with the written dtype) and the weights, in `model.safetensors`, or one file per pipeline stage and
    an index. `extra_files` also copies the tokenizer and the other small files of `hf_source_dir`. A collective: every
    rank calls it; the first data-parallel replica writes, and the files are complete when every rank has returned. Each
    is renamed into place, the weights after the config, so a reader never sees half a file. Raises OSError when
    `out_dir` cannot be written.

    Returns, if asked `with_checksums`, the hashes of the tensors that this rank writes, taken from memory before they
    are written: those of all ranks together are the whole model's. Else, and on ranks that write nothing, it is empty.
    """
    target = Path(out_dir)
    writes = parallel_state.get_data_parallel_rank() == 0 and _tensor_parallel()[1] == 0
    if writes:
        target.mkdir(parents=True, exist_ok=True)
        if parallel_state.is_pipeline_first_stage():
            _write_config(Path(hf_source_dir), target, next(unwrap(model).parameters()).dtype)
            if extra_files:
                _copy_extra_files(Path(hf_source_dir), target)
    # A rank that does not write takes part in the gathering, and keeps nothing.
    tensors = {name: tensor.contiguous().cpu() for name, tensor in named_hf_tensors(model) if writes}
    sums = checksums(tensors) if writes and with_checksums else {}
    stages = parallel_state.get_pipeline_model_parallel_world_size()
    if stages == 1:
        if writes:
            _write_tensors(tensors, target / "model.safetensors")
        return sums
    stage = parallel_state.get_pipeline_model_parallel_rank()
    file = f"model-{stage + 1:05d}-of-{stages:05d}.safetensors"
    if writes:
        _write_tensors(tensors, target / file)
    listings: list[Any] = [None] * stages
    dist.all_gather_object(listings, (file, sorted(tensors)), group=parallel_state.get_pipeline_model_parallel_group())
    if writes and stage == 0:
        weight_map = {name: owner for owner, names in listings for name in names}
        index = msgspec.json.encode({"metadata": {}, "weight_map": weight_map})
        _replace(target / "model.safetensors.index.json", index)
    return sums


def _tensor_parallel() -> tuple[int, int]:
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_tensor_model_parallel_rank(),
    )


def _write_config(source: Path, target: Path, dtype: torch.dtype) -> None:
    config = msgspec.json.decode((source / "config.json").read_bytes())
    config.pop("torch_dtype", None)
    config["dtype"] = str(dtype).removeprefix("torch.")
    _replace(target / "config.json", msgspec.json.format(msgspec.json.encode(config), indent=2))


def _copy_extra_files(source: Path, target: Path) -> None:
    weights = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")
    for path in source.iterdir():
        if path.is_file() and path.name != "config.json" and not path.name.endswith(weights):
            shutil.copyfile(path, target / path.name)


def _write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    save_file(tensors, temporary, metadata={"format": "pt"})
    temporary.replace(path)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)


def _listed(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Reader:
    """The safetensors files of a directory, read one tensor or one shard of it at a time."""

    def __init__(self, hf_dir: str) -> None:
        paths = sorted(Path(hf_dir).glob("*.safetensors"))
        if not paths:
            raise DataError(f"{hf_dir}: no *.safetensors file with weights")
        self._hf_dir = hf_dir
        self._file_of: dict[str, Any] = {}
        for path in paths:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise DataError(f"{path}: cannot be read: {error}") from error
            self._file_of.update(dict.fromkeys(file.keys(), file))
        self.names = set(self._file_of)

    def read(self, name: str, shard_dim: int | None, rank: int, size: int) -> Tensor:
        """Return the tensor, or this rank's `1 / size` of it along `shard_dim`."""
        if shard_dim is None or size == 1:
            return self._file_of[name].get_tensor(name)
        piece = self._file_of[name].get_slice(name)
        shape = piece.get_shape()
        if shard_dim >= len(shape) or shape[shard_dim] % size:
            raise DataError(f"{self._hf_dir}: {name} has shape {tuple(shape)}, which {size} ranks cannot share")
        step = shape[shard_dim] // size
        index = [slice(None)] * shard_dim + [slice(rank * step, (rank + 1) * step)]
        return piece[tuple(index)]
