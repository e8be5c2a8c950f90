"""How far the trainer is from the engine on sampled tokens: divergences, perplexities, χ², effective sample size.

With q the engine's and p the trainer's probability of a sampled token, w = p / q: KL(q || p) is estimated by the mean
of -log w and by k3 = w - 1 - log w (joschu.net/blog/kl-approx.html), χ²(p || q) by the mean of w² - 1, and the share of
the effective sample size by (Σ w)² / (N Σ w²) (Kong 1992).
"""

# ruff: noqa: N803, N806  the shape suffixes
# B sequences, R response tokens of all of them

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_hooks_contrib.segments import bounded_exp

if TYPE_CHECKING:
    from torch import Tensor

    from miles_hooks_contrib.segments import Segments

__all__ = ["mismatch_metrics"]

_MOST = 80.0
"""Nats up to which an exponent of a metric is taken: beyond, fp32 has no number for it."""


def mismatch_metrics(segments: Segments, train_R: Tensor, log_ratio_R: Tensor, sums_B: Tensor) -> dict[str, Tensor]:
    """Return metrics of every token by name, each (R,) in fp32; those of a sequence stand at each of its tokens.

    `training_log_ppl, training_ppl, rollout_log_ppl, rollout_ppl` are perplexities of a response, `log_ppl_diff,
    log_ppl_abs_diff, ppl_ratio` compare them: above 0 (1) the trainer finds the response less likely. `kl` and `k3_kl`
    are of a token, `chi2_token` and `ess` of a response's tokens, `chi2_seq` of a response as a whole, `ess_seq` of
    the responses of this micro-batch. `train_R` and the log-ratios must be 0 for masked tokens, `sums_B` are the sums
    of the latter.
    """
    train_B, gap_B = segments.means(train_R), -sums_B / segments.weights_B.clamp_min(1.0)
    rollout_B = train_B + gap_B
    ratio_R, ratio_B = bounded_exp(log_ratio_R), bounded_exp(sums_B)
    square_B = segments.sums(ratio_R.square())
    some_B = segments.weights_B > 0
    of_sequences = {
        "training_log_ppl": -train_B,
        "training_ppl": (-train_B).clamp(max=_MOST).exp(),
        "rollout_log_ppl": -rollout_B,
        "rollout_ppl": (-rollout_B).clamp(max=_MOST).exp(),
        "log_ppl_diff": gap_B,
        "log_ppl_abs_diff": gap_B.abs(),
        "ppl_ratio": gap_B.clamp(max=_MOST).exp(),
        "chi2_token": square_B / segments.weights_B.clamp_min(1.0) - 1.0,
        "chi2_seq": ratio_B.square() - 1.0,
        "ess": _share(segments.sums(ratio_R), square_B, segments.weights_B),
        "ess_seq": _share((ratio_B * some_B).sum(), (ratio_B.square() * some_B).sum(), some_B.sum()).expand_as(gap_B),
    }
    return {
        "kl": -log_ratio_R,
        "k3_kl": log_ratio_R.clamp(max=_MOST).exp() - log_ratio_R - 1.0,
        **segments.spread_all(of_sequences),
    }


def _share(total: Tensor, squares: Tensor, count: Tensor) -> Tensor:
    """Return (Σ w)² / (N Σ w²), 0 of nothing."""
    # The squares of weights within ±20 nats are at least 4e-18.
    return total.square() / (count * squares).clamp_min(1e-30)
