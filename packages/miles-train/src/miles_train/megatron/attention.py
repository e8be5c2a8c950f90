"""Attention over packed sequences without a GPU: pad once, one causal SDPA per bucket of similar lengths, gather back.

Padding on the right with a causal mask needs no other mask: a real query sees only real keys before it, and what
padded queries see is thrown away. Rotary positions are applied here too, from one table for all sequences, where
Megatron's own CPU path loops over the sequences in every layer.
"""

# ruff: noqa: N806  the shape suffixes
# T packed tokens, H query heads, G key/value heads, D head size, P padded slots, B sequences, L longest of a bucket

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .cpu import has_gpu

__all__ = ["Layout", "PackedAttention", "Rotary", "count_slots"]

_CALL = 2**11
"""Time of one more call of attention, in pairs of query and key: between 500 and 4,000 were measured on models of 1,024
to 128 numbers a token, where a pair takes 0.18 ns a number."""


class Layout:
    """Where each packed token sits among padded sequences; made once per micro-batch and shared by all layers."""

    def __init__(self, lengths: list[int]) -> None:
        """Plan buckets for sequences of `lengths` tokens, in packing order."""
        lengths_B = torch.tensor(lengths)
        total = int(lengths_B.sum())
        ends_B = lengths_B.cumsum(0)
        self.total = total
        self.longest = max(lengths)
        self.positions_T = torch.arange(total) - torch.repeat_interleave(ends_B - lengths_B, lengths_B)
        """Position of each packed token within its sequence, int64."""
        self.buckets, starts_B = _plan(lengths)
        """(sequences, padded length) of each bucket, in slot order."""
        self.num_slots = sum(count * longest for count, longest in self.buckets)
        is_dense = self.num_slots == total and len(self.buckets) == 1
        self.slots_T = None if is_dense else torch.repeat_interleave(starts_B, lengths_B) + self.positions_T
        """Padded slot of each packed token, int64; None where the packing is the padding: all lengths are equal."""
        self.rotation: tuple[Tensor, Tensor] | None = None
        """Cosines and sines of the packed positions, filled in by `Rotary`."""


def count_slots(lengths: list[int]) -> int:
    """Return how many slots attention computes for packed sequences: one a token, and on a CPU the padding."""
    return sum(lengths) if has_gpu() else sum(count * longest for count, longest in _plan(lengths)[0])


def _plan(lengths: list[int]) -> tuple[list[tuple[int, int]], Tensor]:
    """Return the buckets, longest first, and the first slot of each sequence."""
    starts, buckets = [0] * len(lengths), []
    longest = count = waste = start = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        waste += _work(longest) - _work(lengths[index])
        if not count or waste > _CALL:
            start += count * longest
            longest, count, waste = lengths[index], 0, 0
            buckets.append((count, longest))
        starts[index] = start + count * longest
        count += 1
        buckets[-1] = (count, longest)
    return buckets, torch.tensor(starts)


def _work(length: int) -> int:
    """Return the time of one sequence in attention, forward and backward, in that of one pair of query and key."""
    return length * (length + 28)


class Rotary:
    """Rotary position embedding for whole packed micro-batches; one object is shared by all layers."""

    def __init__(self, head_dim: int, theta: float) -> None:
        self._inverse_frequency = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim)
        self._cos = self._sin = torch.empty(0)

    def rotation(self, layout: Layout) -> tuple[Tensor, Tensor]:
        """Return cosines and sines (T, 1, D/2) of the layout's positions, computed once per layout."""
        if layout.rotation is None:
            if len(self._cos) < layout.longest:
                angles = torch.outer(torch.arange(layout.longest).float(), self._inverse_frequency)
                self._cos, self._sin = angles.cos(), angles.sin()
            positions = layout.positions_T
            layout.rotation = self._cos[positions].unsqueeze(1), self._sin[positions].unsqueeze(1)
        return layout.rotation


class PackedAttention(torch.nn.Module):
    """Core attention for Megatron's self-attention on a CPU; given to it through the ModuleSpec.

    Needs `packed_seq_params.layout`, a `Layout`. It takes queries (T, H, D), keys and values (T, G, D) before rotary
    embedding and returns (T, H · D).
    """

    def __init__(self, *, rotary: Rotary, softmax_scale: float | None = None, **_unused: Any) -> None:
        super().__init__()
        self.rotary = rotary
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, /, *,
                packed_seq_params: Any, **_unused: Any) -> Tensor:  # fmt: skip
        """Attend within each packed sequence."""
        layout: Layout = packed_seq_params.layout
        cos, sin = self.rotary.rotation(layout)
        query_P = _Pad.apply(_Rotate.apply(query, cos, sin), layout)
        key_P = _Pad.apply(_Rotate.apply(key, cos, sin), layout)
        value_P = _Pad.apply(value, layout)
        sizes = [count * longest for count, longest in layout.buckets]
        parts = zip(layout.buckets, query_P.split(sizes), key_P.split(sizes), value_P.split(sizes), strict=True)
        outputs = [self._attend(bucket, *qkv) for bucket, *qkv in parts]
        output_P = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return _Gather.apply(output_P, layout)

    def _attend(self, bucket: tuple[int, int], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = (x.view(*bucket, *x.shape[1:]).transpose(1, 2) for x in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        output = functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=grouped
        )
        return output.transpose(1, 2).reshape(bucket[0] * bucket[1], -1)


class _Rotate(torch.autograd.Function):
    """Rotate (T, heads, D) by the angles of its positions; the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, sin, -1.0), None, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, direction: float) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype)
    low, high = x.chunk(2, dim=-1)
    out_low, out_high = out.chunk(2, dim=-1)
    torch.mul(low, cos, out=out_low).addcmul_(high, sin, value=-direction)
    torch.mul(high, cos, out=out_high).addcmul_(low, sin, value=direction)
    return out


class _Pad(torch.autograd.Function):
    """Put packed rows into their slots, zeros elsewhere; the gradient gathers them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return _to_slots(x, layout)

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _from_slots(grad, ctx.layout), None


class _Gather(torch.autograd.Function):
    """Take the packed rows out of their slots; the gradient puts them back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layout: Layout) -> Tensor:
        ctx.layout = layout
        return _from_slots(x, layout)

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _to_slots(grad, ctx.layout), None


def _to_slots(x: Tensor, layout: Layout) -> Tensor:
    if layout.slots_T is None:
        return x.contiguous()
    return x.new_zeros(layout.num_slots, *x.shape[1:]).index_copy_(0, layout.slots_T, x)


def _from_slots(x: Tensor, layout: Layout) -> Tensor:
    return x.contiguous() if layout.slots_T is None else x.index_select(0, layout.slots_T)
