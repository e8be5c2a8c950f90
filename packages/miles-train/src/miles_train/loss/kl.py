"""Estimates of the KL divergence of the policy from a reference model, token by token
(joschu.net/blog/kl-approx.html)."""

# ruff: noqa: N803  the shape suffix: R response tokens of the micro-batch

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

__all__ = ["kl_divergence"]

_LOW_VAR_LEAST = -80.0
"""Log-ratio below which low_var_kl takes this one: its own bound has been reached, and exp in fp32 would overflow."""
_LOW_VAR_MOST = 10.0
"""Nats that low_var_kl is at most."""


def kl_divergence(
    log_ratio_R: Tensor, kind: Literal["k1", "k2", "k3", "low_var_kl"], weights_R: Tensor | None = None
) -> Tensor:
    """Return an estimate of KL(policy ‖ reference) for each token, times its weight; gradients flow through both.

    `log_ratio_R` is d = log-prob less that of the reference model: k1 = d, k2 = d² / 2, k3 = exp(-d) - 1 + d, and
    low_var_kl is k3, weight included, kept within 10 nats, where its gradient ends. On tokens of the policy itself k1
    and k3 have the right mean, and k2 has the right mean gradient; that of k1 is 0, that of k3 is of
    KL(reference ‖ policy).
    """
    if kind == "low_var_kl":
        return _weighted(_k3(log_ratio_R.clamp(min=_LOW_VAR_LEAST)), weights_R).clamp(max=_LOW_VAR_MOST)
    if kind == "k1":
        return _weighted(log_ratio_R, weights_R)
    return _weighted(log_ratio_R.square() / 2 if kind == "k2" else _k3(log_ratio_R), weights_R)


def _k3(log_ratio_R: Tensor) -> Tensor:
    # expm1: close to the reference the two parts almost cancel.
    return torch.expm1(-log_ratio_R) + log_ratio_R


def _weighted(values_R: Tensor, weights_R: Tensor | None) -> Tensor:
    return values_R if weights_R is None else values_R * weights_R
