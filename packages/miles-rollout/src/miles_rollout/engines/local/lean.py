"""A lean forward for dense Llama-like models: fused projections, RoPE as one complex product, no module tree.

Rows of the q and k projections are permuted so that the two halves RoPE rotates lie side by side: a rotation is then
one complex multiplication, and q·k does not see the permutation. RMSNorm's weights are multiplied into the projection
that follows, and x / sqrt(mean(x²) + eps) is computed as sqrt(E)·x / hypot(|x|, sqrt(E·eps)): three operations.
Legend: B rows, P prompts, L positions, H query heads, K key/value heads, D head dimension, E hidden size.
"""

# ruff: noqa: N803, N806 - tensor names end in their shape
from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812

from miles_rollout.engines.local.kv import KVLayout, KVPool, KVRows, Prefill
from miles_rollout.engines.local.lean_config import LeanConfig
from miles_rollout.engines.local.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from miles_rollout.engines.local.weights import Weights

__all__ = ["LeanModel"]

_SCORE_LOGITS = 8_000_000
"""Logits computed at once when a prompt is scored."""
_ROTATION_PAGE = 256


class _Layer(NamedTuple):
    qkv: torch.Tensor
    """Norm weights and sqrt(E) multiplied in, as in `gate_up`."""
    qkv_bias: torch.Tensor | None
    qk_norm: torch.Tensor | None
    """`[H + K, D]`, times sqrt(D)."""
    out: torch.Tensor
    """Transposed, as is `down`."""
    out_bias: torch.Tensor | None
    gate_up: torch.Tensor
    down: torch.Tensor


class _Weights(NamedTuple):
    embedding: torch.Tensor
    layers: list[_Layer]
    norm: torch.Tensor
    """Times sqrt(E)."""
    head: torch.Tensor

    def named(self) -> dict[str, torch.Tensor]:
        """Return the tensors by name."""
        named = {"embedding": self.embedding, "norm": self.norm, "head": self.head}
        for index, layer in enumerate(self.layers):
            named |= {f"layers.{index}.{k}": t for k, t in layer._asdict().items() if t is not None}
        return named


class LeanModel:
    """A `SlotModel` for the configurations `LeanConfig` covers."""

    impl = "lean"
    deterministic = False

    def __init__(self, directory: Path, max_total_len: int | None) -> None:
        self.config = config = LeanConfig.read(directory, max_total_len)
        self.vocab_size, self.max_positions = config.vocab_size, config.max_positions
        self.layout: KVLayout = [(config.kv_heads, config.head_dim, config.head_dim)] * config.layers
        self._rotations = torch.zeros(0, config.head_dim // 2, dtype=torch.cfloat)
        self._scale = config.head_dim**-0.5
        # sqrt(width · eps) for the two widths that are normalised.
        self._floor = torch.tensor((config.hidden * config.eps) ** 0.5)
        self._head_floor = torch.tensor((config.head_dim * config.eps) ** 0.5)
        self._weights = _read(config, directory)

    def stage(self, weights: Weights) -> Callable[[], None]:
        """Read and check other weights; see `SlotModel`."""
        read = _read(self.config, weights)

        def commit() -> None:
            self._weights = read

        return commit

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live (fused) weights by name."""
        return self._weights.named()

    def computed(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Return the fused weights of others by name; see `SlotModel`."""
        return _read(self.config, weights).named()

    def prefill(self, tokens_BL: torch.Tensor, lengths: torch.Tensor) -> Prefill:
        """Run right-padded prompts from nothing; see `SlotModel`."""
        hidden_BLE, keys, values = self._run_prompts(tokens_BL)
        last_BE = hidden_BLE[torch.arange(len(lengths)), lengths - 1]
        return Prefill(keys, values, self._logits(last_BE))

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Return log-probs of `tokens[start + 1:]`; see `SlotModel`."""
        hidden_LE = self._run_prompts(tokens[None, :-1])[0][0, start:]
        targets = tokens[start + 1 :, None]
        step = max(1, _SCORE_LOGITS // self.vocab_size)
        parts = [
            self._logits(hidden_LE[i : i + step]).log_softmax(-1).gather(1, targets[i : i + step])
            for i in range(0, len(hidden_LE), step)
        ]
        return torch.cat(parts).squeeze(1) if parts else torch.zeros(0)

    def _run_prompts(self, tokens_PL: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        config, weights = self.config, self._weights
        prompts, length = tokens_PL.shape
        rotation = self._rotation_table(length)[None, :, None]
        x = weights.embedding[tokens_PL.reshape(-1)]
        keys, values = [], []
        for layer in weights.layers:
            rotated, v = self._project(layer, x, rotation, (prompts, length))
            q = rotated[:, :, : config.heads].transpose(1, 2)
            k = rotated[:, :, config.heads :].transpose(1, 2)
            v = v.transpose(1, 2)
            # Right padding: no real position attends to a padded one, so causal is all the mask there is.
            attended = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=config.heads != config.kv_heads
            )
            x = self._finish_layer(layer, x, attended.transpose(1, 2).reshape(prompts * length, -1))
            keys.append(k)
            values.append(v)
        return x.view(prompts, length, -1), keys, values

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, pool: KVPool | KVRows, length: int) -> torch.Tensor:
        """Run one token per row; see `SlotModel`."""
        config, weights = self.config, self._weights
        rows, kv_heads, dim = len(tokens), config.kv_heads, config.head_dim
        group = config.heads // kv_heads
        rotation = self._rotation_table(length)[positions][:, None]
        first = torch.arange(rows * kv_heads) * pool.length
        place = (first.view(rows, kv_heads) + positions[:, None]).view(-1)
        hidden = torch.arange(length) > positions[:, None]
        mask = torch.zeros(rows, length).masked_fill_(hidden, float("-inf"))
        mask = mask.repeat_interleave(kv_heads, 0)[:, None] if kv_heads > 1 else mask[:, None]
        x = weights.embedding[tokens]
        for index, layer in enumerate(weights.layers):
            rotated, v = self._project(layer, x, rotation, (rows,))
            all_k, all_v = pool.keys[index], pool.values[index]
            k = rotated[:, config.heads :].reshape(-1, dim)
            all_k.view(-1, dim).index_copy_(0, place, k)
            all_v.view(-1, dim).index_copy_(0, place, v.reshape(-1, dim))
            q = rotated[:, : config.heads].reshape(-1, group, dim)
            # The rows' first `length` positions, K transposed, as one view each.
            seen_k = all_k.as_strided((rows * kv_heads, dim, length), (pool.length * dim, 1, dim))
            seen_v = all_v.as_strided((rows * kv_heads, length, dim), (pool.length * dim, dim, 1))
            x = self._finish_layer(layer, x, self._attend(q, seen_k, seen_v, mask).view(rows, -1))
        return self._logits(x)

    def _attend(self, q: torch.Tensor, seen_k: torch.Tensor, seen_v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return `[B·K, H / K, D]`; `q` is like it, K `[B·K, D, L]`, V `[B·K, L, D]`, the mask `[B·K, 1, L]`."""
        scores = torch.baddbmm(mask, q, seen_k, alpha=self._scale)
        return torch.bmm(scores.softmax(-1), seen_v)

    def _project(
        self, layer: _Layer, x: torch.Tensor, rotation: torch.Tensor, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotated q and k together, `[*shape, H + K, D]`, and v, `[*shape, K, D]`."""
        config = self.config
        turned = config.heads + config.kv_heads
        qkv = F.linear(self._normed(x, self._floor), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(*shape, turned + config.kv_heads, config.head_dim)
        qk = qkv[..., :turned, :]
        if layer.qk_norm is not None:
            qk = self._normed(qk, self._head_floor).mul_(layer.qk_norm)
        rotated = torch.view_as_real(torch.view_as_complex(qk.unflatten(-1, (-1, 2))) * rotation).flatten(-2)
        return rotated, qkv[..., turned:, :]

    def _finish_layer(self, layer: _Layer, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        ffn = self.config.ffn
        x = torch.addmm(x, attended, layer.out)
        if layer.out_bias is not None:
            x += layer.out_bias
        gate_up = F.linear(self._normed(x, self._floor), layer.gate_up)
        return torch.addmm(x, F.silu(gate_up[:, :ffn]).mul_(gate_up[:, ffn:]), layer.down)

    def _logits(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self._normed(x, self._floor).mul_(self._weights.norm), self._weights.head)

    @staticmethod
    def _normed(x: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
        """Return x / sqrt(|x|² + floor²): RMSNorm without its weight and the square root of its width."""
        return x / torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), floor)

    def _rotation_table(self, length: int) -> torch.Tensor:
        """Return e^(i·position·frequency), `[length, D / 2]` complex, grown by need.

        In pages, each computed alone: how a place is rounded does not depend on how long the table is by then.
        """
        if length > len(self._rotations):
            pages, frequencies = [self._rotations], _inverse_frequencies(self.config)
            for start in range(len(self._rotations), 2 * length, _ROTATION_PAGE):
                angles = torch.outer(torch.arange(start, start + _ROTATION_PAGE, dtype=torch.float), frequencies)
                pages.append(torch.polar(torch.ones_like(angles), angles))
            self._rotations = torch.cat(pages)
        return self._rotations if self._rotations.shape[0] == length else self._rotations[:length]


def _inverse_frequencies(config: LeanConfig) -> torch.Tensor:
    """Return RoPE's inverse frequencies, `[head_dim / 2]` float32."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float) / config.head_dim
    plain = 1.0 / (config.rope["rope_theta"] ** exponents)
    return _llama3(plain, config.rope) if config.rope["rope_type"] == "llama3" else plain


def _llama3(plain: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Stretch low frequencies by `factor`, keep high ones, and blend between."""
    factor, old_length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    wavelength = 2 * math.pi / plain
    blend = (old_length / wavelength - low) / (high - low)
    medium = (1 - blend) * plain / factor + blend * plain
    stretched = torch.where(wavelength > old_length / low, plain / factor, plain)
    is_medium = ~(wavelength < old_length / high) & ~(wavelength > old_length / low)
    return torch.where(is_medium, medium, stretched)


def _side_by_side(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Interleave the two halves of each head's rows, so that a rotated pair is adjacent."""
    shape = weight.shape
    return weight.view(heads, 2, -1, *shape[1:]).transpose(1, 2).reshape(shape)


def _expected(config: LeanConfig) -> dict[str, tuple[int, ...]]:
    """Return every tensor a checkpoint must hold, with its shape."""
    e, q, kv = config.hidden, config.heads * config.head_dim, config.kv_heads * config.head_dim
    names: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, e), "model.norm.weight": (e,)}
    if not config.tied:
        names["lm_head.weight"] = (config.vocab_size, e)
    for index in range(config.layers):
        at = f"model.layers.{index}"
        names |= {f"{at}.input_layernorm.weight": (e,), f"{at}.post_attention_layernorm.weight": (e,)}
        for name, width in (("q", q), ("k", kv), ("v", kv)):
            names[f"{at}.self_attn.{name}_proj.weight"] = (width, e)
            if config.qkv_bias:
                names[f"{at}.self_attn.{name}_proj.bias"] = (width,)
        names[f"{at}.self_attn.o_proj.weight"] = (e, q)
        if config.out_bias:
            names[f"{at}.self_attn.o_proj.bias"] = (e,)
        if config.qk_norm:
            names |= {f"{at}.self_attn.{n}_norm.weight": (config.head_dim,) for n in "qk"}
        names |= {f"{at}.mlp.{n}_proj.weight": (config.ffn, e) for n in ("gate", "up")}
        names[f"{at}.mlp.down_proj.weight"] = (e, config.ffn)
    return names


def _read(config: LeanConfig, source: Weights) -> _Weights:
    """Read a checkpoint into fused weights, after all names and shapes are checked."""
    with Checkpoint(source) as checkpoint:
        ignored = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(config.layers)}
        checkpoint.check(_expected(config), ignored | ({"lm_head.weight"} if config.tied else set()))
        # A clone: the file behind a memory-mapped tensor may be replaced by the next checkpoint.
        embedding = checkpoint.get("model.embed_tokens.weight").clone()
        head = embedding if config.tied else checkpoint.get("lm_head.weight").clone()
        layers = [_read_layer(config, checkpoint, f"model.layers.{index}.") for index in range(config.layers)]
        return _Weights(embedding, layers, checkpoint.get("model.norm.weight") * config.hidden**0.5, head)


def _read_layer(config: LeanConfig, checkpoint: Checkpoint, at: str) -> _Layer:
    def get(name: str) -> torch.Tensor:
        return checkpoint.get(at + name)

    def fused_qkv(kind: str) -> torch.Tensor:
        q = _side_by_side(get(f"self_attn.q_proj.{kind}"), config.heads)
        k = _side_by_side(get(f"self_attn.k_proj.{kind}"), config.kv_heads)
        return torch.cat([q, k, get(f"self_attn.v_proj.{kind}")])

    qk_norm = None
    if config.qk_norm:
        q, k = (_side_by_side(get(f"self_attn.{n}_norm.weight"), 1) for n in "qk")
        qk_norm = torch.cat([q.expand(config.heads, -1), k.expand(config.kv_heads, -1)]) * config.head_dim**0.5
    root = config.hidden**0.5
    return _Layer(
        qkv=fused_qkv("weight").mul_(get("input_layernorm.weight") * root),
        qkv_bias=fused_qkv("bias") if config.qkv_bias else None,
        qk_norm=qk_norm,
        out=get("self_attn.o_proj.weight").clone().t(),
        out_bias=get("self_attn.o_proj.bias").clone() if config.out_bias else None,
        gate_up=torch.cat([get("mlp.gate_proj.weight"), get("mlp.up_proj.weight")]).mul_(
            get("post_attention_layernorm.weight") * root
        ),
        down=get("mlp.down_proj.weight").clone().t(),
    )
