"""Drawing tokens for a whole batch at once, each row from its own counter-based random numbers.

Row i uses one uniform number, a hash of (its seed, the position drawn), and inverts its cumulative distribution: what a
request draws does not depend on its neighbours. Legend: B rows, V vocabulary, C chunks of the vocabulary.
"""

# ruff: noqa: N803, N806 - tensor names end in their shape
from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = ["SamplingRows", "Truncation", "sample", "uniforms"]

_CHUNK = 256
_FLAT_LIMIT = 1024
"""Vocabularies up to here are scanned in one go, larger ones chunk by chunk."""


class Truncation(NamedTuple):
    """Rows with the same top-k, that of some also with top-p or min-p.

    Together, as how many candidates are ranked decides which of two equally likely ones comes first.
    """

    rows: torch.Tensor | None
    """Int64; None for all."""
    width: int
    """Their top-k; the vocabulary size where not limited."""


class SamplingRows(NamedTuple):
    """The sampling parameters of a batch, one entry per row; the flags say what no row needs."""

    temperature: torch.Tensor
    """Float32; 1 in greedy rows."""
    greedy: torch.Tensor
    """Bool."""
    top_p: torch.Tensor
    min_p: torch.Tensor
    any_scaled: bool
    any_greedy: bool
    all_greedy: bool
    truncated: list[Truncation]
    """The rows that do not draw from all tokens."""


def sample(
    logits_BV: torch.Tensor, rows: SamplingRows, uniform: torch.Tensor, *, exact: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row with its number from `uniforms`; return tokens (int64) and their log-probs (float32).

    The log-prob is that of the temperature-scaled distribution before top-k, top-p and min-p, as in SGLang; a greedy
    row reports temperature 1. `logits_BV` may be overwritten. With `exact` nothing depends on the row's place, to the
    last bit: not the log, of which a vectorised one may round its tail otherwise, nor the order of equal candidates.
    """
    if rows.any_scaled:
        logits_BV = logits_BV.div_(rows.temperature[:, None])
    probs_BV = logits_BV.softmax(-1)
    if rows.all_greedy:
        tokens = _most_likely(probs_BV)
    else:
        tokens = _drawn(probs_BV, uniform, rows, exact=exact)
        if rows.any_greedy:
            tokens = torch.where(rows.greedy, _most_likely(probs_BV), tokens)
    chosen = probs_BV.gather(1, tokens[:, None]).squeeze(1)
    return tokens, _logs(chosen) if exact else chosen.log_()


def _logs(probs: torch.Tensor) -> torch.Tensor:
    return torch.tensor([-math.inf if p == 0 else math.log(p) for p in probs.tolist()])


def uniforms(seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Hash (seed, position), both int64, to float32 in [0, 1) with 24 bits: two rounds of splitmix64's finaliser."""
    return (_mix(_mix(seeds) + positions * _signed(0x9E3779B97F4A7C15)) >> 40).bitwise_and_(0xFFFFFF) * 2.0**-24


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _mix(x: torch.Tensor) -> torch.Tensor:
    """Apply splitmix64's finaliser; a right shift of int64 keeps the sign, hence the masks."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ ((x >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ ((x >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return x ^ ((x >> 31) & ((1 << 33) - 1))


def _invert(weights: torch.Tensor, target_share: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first index whose cumulative weight exceeds the share of the total, and that target."""
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding must not lift the target to the total, which no cumulative weight exceeds.
    target = torch.minimum(target_share * total, torch.nextafter(total, torch.zeros_like(total)))
    return (cumulative <= target[:, None]).sum(-1), target


def _drawn(probs_BV: torch.Tensor, uniform: torch.Tensor, rows: SamplingRows, *, exact: bool) -> torch.Tensor:
    """Draw from all tokens, or where a row truncates them from its most likely ones."""
    if rows.truncated and rows.truncated[0].rows is None:
        width = rows.truncated[0].width
        return _draw_truncated(probs_BV, uniform, width, rows.top_p, rows.min_p, stable=exact)
    tokens = _draw(probs_BV, uniform)
    for index, width in rows.truncated:
        limits = (rows.top_p[index], rows.min_p[index])
        tokens[index] = _draw_truncated(probs_BV[index], uniform[index], width, *limits, stable=exact)
    return tokens


def _draw(probs_BV: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    vocabulary = probs_BV.shape[1]
    if vocabulary <= _FLAT_LIMIT:
        return _invert(probs_BV, uniform)[0]
    sums_BC = _reduce_chunks(probs_BV, "sum")
    chunk, target = _invert(sums_BC, uniform)
    before = sums_BC.cumsum(-1).gather(1, chunk[:, None]) - sums_BC.gather(1, chunk[:, None])
    weights, columns = _chunk_of(probs_BV, chunk, 0.0)
    inside = weights.cumsum(-1)
    top = inside[:, -1:]
    rest = torch.minimum((target[:, None] - before).clamp_(min=0), torch.nextafter(top, torch.zeros_like(top)))
    return columns.gather(1, (inside <= rest).sum(-1, keepdim=True)).squeeze(1)


def _most_likely(probs_BV: torch.Tensor) -> torch.Tensor:
    """Return the first most likely token; a vectorised max per chunk beats one argmax over the vocabulary."""
    if probs_BV.shape[1] <= _FLAT_LIMIT:
        return probs_BV.argmax(-1)
    chunk = _reduce_chunks(probs_BV, "amax").argmax(-1)
    weights, columns = _chunk_of(probs_BV, chunk, -1.0)
    return columns.gather(1, weights.argmax(-1, keepdim=True)).squeeze(1)


def _reduce_chunks(probs_BV: torch.Tensor, how: str) -> torch.Tensor:
    whole = probs_BV.shape[1] // _CHUNK * _CHUNK
    reduced = getattr(probs_BV[:, :whole].unflatten(1, (-1, _CHUNK)), how)(-1)
    if whole == probs_BV.shape[1]:
        return reduced
    return torch.cat([reduced, getattr(probs_BV[:, whole:], how)(-1)[:, None]], 1)


def _chunk_of(probs_BV: torch.Tensor, chunk: torch.Tensor, filler: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return one chunk per row and its columns; places past the vocabulary hold `filler`."""
    columns = chunk[:, None] * _CHUNK + torch.arange(_CHUNK)
    outside = columns >= probs_BV.shape[1]
    columns.clamp_(max=probs_BV.shape[1] - 1)
    return probs_BV.gather(1, columns).masked_fill_(outside, filler), columns


def _draw_truncated(
    probs_BV: torch.Tensor, uniform: torch.Tensor, width: int, top_p: torch.Tensor, min_p: torch.Tensor, *, stable: bool
) -> torch.Tensor:
    """Draw with top-k (`width`), top-p and min-p, applied to the sorted distribution as SGLang's torch sampler does."""
    # With a top-k only so many candidates can survive, and a partial sort finds them.
    if width < probs_BV.shape[1]:
        ranked, tokens = probs_BV.topk(width, dim=-1)
    else:
        ranked, tokens = probs_BV.sort(dim=-1, descending=True, stable=stable)
    before = ranked.cumsum(-1) - ranked
    # top_p = 1 keeps everything: rounding of the sum must not cut the tail.
    drop = (before > top_p[:, None]) & (top_p[:, None] < 1)
    drop |= ranked < ranked[:, :1] * min_p[:, None]
    return tokens.gather(1, _invert(ranked.masked_fill(drop, 0.0), uniform)[0][:, None]).squeeze(1)
