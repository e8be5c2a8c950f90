"""The fallback forward: any causal language model of transformers whose cache is plain keys and values.

The model writes into the rows of the `KVPool` through a `Cache` of our own. Architectures differ in ways a config does
not tell, so a loaded model is refused unless prefill and decode through rows equal its own uncached forward.
"""

# ruff: noqa: N803 - tensor names end in their shape
from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache

from miles_rollout.engines.local.errors import CheckpointError, UnsupportedModelError
from miles_rollout.engines.local.kv import KVLayout, KVPool, Prefill

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from miles_rollout.engines.local.weights import Weights

__all__ = ["HFModel"]

_PREFILL_LOGITS = 32_000_000
_TOLERANCE = 2e-4
_PROBE_LENGTHS = (7, 12, 3)
_LAYOUT_PROBE = 2


class _RowCache(Cache):
    """Shows transformers the pool's rows as one cache; `update` writes one token per row."""

    def __init__(self, pool: KVPool, positions: torch.Tensor, length: int) -> None:
        super().__init__(layers=[])
        self._pool, self._positions, self._length = pool, positions, length
        self._rows = torch.arange(len(positions))

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write `[B, K, 1, D]` at each row's position; return what the rows hold."""
        keys, values = self._pool.keys[layer_idx], self._pool.values[layer_idx]
        keys[self._rows, :, self._positions] = key_states[:, :, 0]
        values[self._rows, :, self._positions] = value_states[:, :, 0]
        return keys[: len(self._rows), :, : self._length], values[: len(self._rows), :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many positions precede the one being run."""
        return self._length - 1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the key length and offset; the mask itself is given by the caller."""
        return self._length, 0


class HFModel:
    """A `SlotModel` around `AutoModelForCausalLM`, in float32."""

    impl = "hf"
    deterministic = False

    def __init__(self, directory: Path, max_total_len: int | None) -> None:
        self._model = _load(directory)
        config = self._model.config
        limit = getattr(config, "max_position_embeddings", None) or max_total_len
        if limit is None:
            raise UnsupportedModelError(
                f"{directory}/config.json names no max_position_embeddings; give --max-total-len"
            )
        self.max_positions = min(max_total_len or limit, limit)
        self.vocab_size = config.vocab_size
        _check_config(config, self.max_positions)
        accepted = inspect.signature(self._model.forward).parameters
        self._can_keep = "logits_to_keep" in accepted
        self.layout = self._find_layout()
        self._self_check()

    def prefill(self, tokens_BL: torch.Tensor, lengths: torch.Tensor) -> Prefill:
        """Run right-padded prompts from nothing; see `SlotModel`."""
        rows = max(1, _PREFILL_LOGITS // (tokens_BL.shape[1] * self.vocab_size)) if not self._can_keep else len(lengths)
        parts: list[Prefill] = []
        for start in range(0, len(lengths), rows):
            cache = DynamicCache()
            ends = lengths[start : start + rows] - 1
            kept, where = torch.unique(ends, return_inverse=True)
            extra = {"logits_to_keep": kept} if self._can_keep else {}
            # Right padding needs no mask: no real position attends to a padded one.
            out = self._model(tokens_BL[start : start + rows], past_key_values=cache, use_cache=True, **extra)
            logits = out.logits[torch.arange(len(ends)), where if self._can_keep else ends]
            layers: list[Any] = cache.layers  # `_find_layout` has seen that each has keys and values
            parts.append(Prefill([x.keys for x in layers], [x.values for x in layers], logits.float()))
        return parts[0] if len(parts) == 1 else _joined(parts)

    def decode(self, tokens: torch.Tensor, positions: torch.Tensor, pool: KVPool, length: int) -> torch.Tensor:
        """Run one token per row; see `SlotModel`."""
        hidden = torch.arange(length) > positions[:, None]
        mask = torch.zeros(len(tokens), length).masked_fill_(hidden, torch.finfo(torch.float32).min)
        out = self._model(
            tokens[:, None],
            attention_mask=mask[:, None, None],
            position_ids=positions[:, None],
            past_key_values=_RowCache(pool, positions, length),
            use_cache=True,
        )
        return out.logits[:, -1].float()

    def score(self, tokens: torch.Tensor, start: int) -> torch.Tensor:
        """Return log-probs of `tokens[start + 1:]`; see `SlotModel`."""
        if start + 1 >= len(tokens):
            return torch.zeros(0)
        logits = self._model(tokens[None, :-1], use_cache=False).logits[0, start:].float()
        return logits.log_softmax(-1).gather(1, tokens[start + 1 :, None]).squeeze(1)

    def stage(self, weights: Weights) -> Callable[[], None]:
        """Load other weights as a whole model, so that transformers converts names as it did at the start."""
        fresh = self._loaded(weights)

        def commit() -> None:
            self._model = fresh

        return commit

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the live weights by name."""
        return dict(self._model.state_dict())

    def computed(self, weights: Weights) -> dict[str, torch.Tensor]:
        """Return others by name; see `SlotModel`."""
        return dict(self._loaded(weights).state_dict())

    def _loaded(self, weights: Weights) -> Any:
        model = self._model
        fresh = _load(weights, model.config) if isinstance(weights, Path) else _take(type(model), weights, model.config)
        want = {name: tuple(t.shape) for name, t in model.state_dict().items()}
        got = {name: tuple(t.shape) for name, t in fresh.state_dict().items()}
        if want != got:
            name = next(iter(sorted(set(want.items()) ^ set(got.items()))))[0]
            raise CheckpointError(f"{weights}: {name} has shape {got.get(name)}, the model needs {want.get(name)}")
        return fresh

    def _find_layout(self) -> KVLayout:
        cache = DynamicCache()
        self._model(torch.zeros(1, _LAYOUT_PROBE, dtype=torch.int64), past_key_values=cache, use_cache=True)
        layout: KVLayout = []
        for layer in cache.layers:
            keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
            if keys is None or values is None or keys.shape[2:3] != (_LAYOUT_PROBE,):
                raise UnsupportedModelError(
                    f"{_kind(self._model)} keeps more than plain keys and values between tokens"
                )
            layout.append((keys.shape[1], keys.shape[3], values.shape[3]))
        if not layout:
            raise UnsupportedModelError(f"{_kind(self._model)} did not fill a cache of keys and values")
        return layout

    def _self_check(self) -> None:
        """Refuse the model unless rows of different lengths, prefilled and decoded, equal the plain forward."""
        generator = torch.Generator().manual_seed(0)
        longest = max(_PROBE_LENGTHS) + 2
        tokens = torch.randint(0, self.vocab_size, (len(_PROBE_LENGTHS), longest), generator=generator)
        lengths = torch.tensor(_PROBE_LENGTHS)
        pool = KVPool(self.layout, len(lengths), longest)
        pool.ensure(len(lengths), longest, 0)
        prefill = self.prefill(tokens[:, : max(_PROBE_LENGTHS)], lengths)
        pool.put(0, prefill, torch.arange(len(lengths)))
        rows = torch.arange(len(lengths))
        got = [prefill.logits]
        for step in range(2):
            at = lengths + step
            got.append(self.decode(tokens[rows, at], at, pool, int(at.max()) + 1))
        for row, length in enumerate(_PROBE_LENGTHS):
            plain = self._model(tokens[row : row + 1, : length + 2], use_cache=False).logits[0].float()
            for step, logits in enumerate(got):
                want = plain[length - 1 + step]
                worst = (logits[row] - want).abs().max().item()
                if not worst <= _TOLERANCE * max(1.0, want.abs().max().item()):
                    raise UnsupportedModelError(
                        f"{_kind(self._model)}: logits through our rows differ from its own forward by {worst:.1e}"
                    )


def _load(directory: Path, config: Any = None) -> Any:
    extra = {} if config is None else {"config": config}
    return _checked(AutoModelForCausalLM, directory, str(directory), trust_remote_code=False, **extra)


def _take(kind: Any, weights: Mapping[str, torch.Tensor], config: Any) -> Any:
    """Make another model of tensors in memory; it has copies of them."""
    sent = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    # Else it raises before it says which size is wrong.
    extra = {"config": config, "state_dict": sent, "ignore_mismatched_sizes": True}
    return _checked(kind, None, "the weights that were sent", **extra)


def _checked(kind: Any, directory: Path | None, origin: str, **extra: Any) -> Any:
    try:
        model, report = kind.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True, **extra
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"transformers cannot load {origin}: {error}") from error
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if report.get(what):
            raise CheckpointError(f"{origin}: {what.replace('_', ' ')}: {sorted(map(str, report[what]))[:5]}")
    return model.eval().requires_grad_(False)


def _check_config(config: AutoConfig, max_positions: int) -> None:
    """Refuse what our mask would silently drop: a window that sequences can outgrow, or chunked attention."""
    kinds = set(getattr(config, "layer_types", None) or [])
    if kinds - {"full_attention", "sliding_attention"}:
        raise UnsupportedModelError(f"layer types {sorted(kinds)} are not covered")
    window = getattr(config, "sliding_window", None)
    # Without layer types a window applies to every layer (Mistral, Phi).
    if window and (not kinds or "sliding_attention" in kinds) and window < max_positions:
        raise UnsupportedModelError(
            f"sliding_window={window} with sequences of up to {max_positions} tokens; --max-total-len {window} is exact"
        )


def _kind(model: Any) -> str:
    return type(model).__name__


def _joined(parts: list[Prefill]) -> Prefill:
    layers = range(len(parts[0].keys))
    return Prefill(
        [torch.cat([part.keys[layer] for part in parts]) for layer in layers],
        [torch.cat([part.values[layer] for part in parts]) for layer in layers],
        torch.cat([part.logits for part in parts]),
    )
