"""How far the trainer's policy is from the engine's, on the tokens that the engine sampled.

With q the engine's and p the trainer's probability of a sampled token, w = p / q: the divergence KL(q || p) is
estimated by the mean of -log w (k1) and of w - 1 - log w (k3, never negative; joschu.net/blog/kl-approx.html); the
share of the effective sample size, (Σ w)² / (N Σ w²) (Kong 1992), says how much of the data is left if it is weighted
by w: 1 where both agree, 1 / N where one token has all the weight.
"""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, R response tokens of the micro-batch

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from miles_train.reducers import segment_sums

if TYPE_CHECKING:
    from torch import Tensor

    from miles_train.metrics import Metrics

__all__ = ["MISMATCH_METRICS", "compare", "finish_mismatch", "mismatch"]

_MOST = 300.0
"""Nats within which k3 takes a log-weight, so that its sum is a number."""
_MEANS = {"logprob_gap_mean": "gap", "mismatch_k1": "k1", "mismatch_k3": "k3"}
_SHARES = {"mismatch_ess": ("w", "ww", "tokens"), "mismatch_ess_samples": ("sample_w", "sample_ww", "samples")}
_SUMS = frozenset({*_MEANS.values(), *(name for names in _SHARES.values() for name in names)})
_PREFIX = "mismatch_sum_"

MISMATCH_METRICS = frozenset({*_MEANS, *_SHARES, "logprob_gap_max", *(_PREFIX + name for name in _SUMS)})
"""Names that these functions use; no hook's metric may have one."""


def mismatch(log_probs_R: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Compare the trainer's log-probs with the engine's, over the unmasked response tokens of one micro-batch.

    Called once for each sample of a rollout, with log-probs of the weights that generated it. Returns sums, fp64
    scalars that add up over micro-batches and ranks until `finish_mismatch` makes means and shares of them, and
    `logprob_gap_max`; nothing without `rollout_log_probs`.
    """
    if "rollout_log_probs" not in batch or not len(log_probs_R):
        return {}
    kept_R = torch.cat(batch["loss_masks"]) != 0
    # fp64: k3 of two fp32 policies that agree is 1e-13.
    log_w_R = torch.where(kept_R, (log_probs_R - torch.cat(batch["rollout_log_probs"])).double(), 0.0)
    gap_R = log_w_R.abs()
    lengths = batch["response_lengths"]
    kept_B = segment_sums(kept_R.long(), lengths) > 0
    bounded_R = log_w_R.clamp(max=_MOST)
    w_R, w_B = log_w_R[kept_R].exp(), segment_sums(log_w_R, lengths)[kept_B].exp()
    sums = {
        "tokens": kept_R.sum(),
        "gap": gap_R.sum(),
        "k1": -log_w_R.sum(),
        "k3": (bounded_R.expm1() - bounded_R).sum(),
        "w": w_R.sum(),
        "ww": w_R.square().sum(),
        "samples": kept_B.sum(),
        "sample_w": w_B.sum(),
        "sample_ww": w_B.square().sum(),
    }
    return {"logprob_gap_max": gap_R.amax()} | {_PREFIX + name: value for name, value in sums.items()}


def compare(metrics: Metrics, log_probs_R: Tensor, batch: dict[str, Any]) -> None:
    """Add to a rollout's metrics how one micro-batch compares: the sums of `mismatch`, and where the gaps are."""
    metrics.add_all(mismatch(log_probs_R, batch))
    metrics.token_gaps.add(log_probs_R, batch)


def finish_mismatch(numbers: dict[str, float]) -> dict[str, float]:
    """Return the metrics with the sums of `mismatch`, over all ranks, replaced by means over tokens and by shares."""
    sums = {name: numbers[_PREFIX + name] for name in _SUMS if _PREFIX + name in numbers}
    named = {name: value for name, value in numbers.items() if not name.startswith(_PREFIX)}
    if not sums.get("tokens"):
        return named
    named |= {name: sums[part] / sums["tokens"] for name, part in _MEANS.items()}
    return named | {name: _share(*(sums[part] for part in parts)) for name, parts in _SHARES.items()}


def _share(total: float, squares: float, count: float) -> float:
    """Return the share of the effective sample size; where weights are too far apart for fp64, one has it all."""
    if not 0 < squares < math.inf:
        return 1 / count
    return min(1.0, total / squares * (total / count))
