"""What loss, importance-weight and reducer hooks import; hooks see whole responses here, so CP helpers change nothing.

No tensor library is imported: the functions use the methods of the tensors they are given.
"""

# ruff: noqa: ARG001  the helpers take what the older ones took

from __future__ import annotations

import contextvars
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = [
    "ParallelState",
    "all_gather_with_cp",
    "compute_approx_kl",
    "compute_policy_loss",
    "get_chunked_loss_masks",
    "get_local_response_loss_masks",
    "get_log_probs_and_entropy",
    "get_parallel_state",
    "get_sum_of_sample_mean",
    "in_loss",
    "slice_log_prob_with_cp",
    "slice_loss_masks_for_local_cp",
    "slice_with_cp",
    "slime_log_probs_and_entropy",
]

ParallelState = Any
"""A rank's place, for annotations: hooks get ours, with `tp`, `pp`, `cp` and `dp`, each with `size` and `rank`."""

_loss: contextvars.ContextVar[tuple[Callable[..., Any], Any] | None] = contextvars.ContextVar("loss", default=None)


@contextmanager
def in_loss(log_probs_and_entropy: Callable[..., Any], parallel: Any) -> Iterator[None]:
    """Make the loss hook's own helpers reachable for functions that it imports."""
    token = _loss.set((log_probs_and_entropy, parallel))
    try:
        yield
    finally:
        _loss.reset(token)


def _current(what: str) -> tuple[Callable[..., Any], Any]:
    current = _loss.get()
    if current is None:
        raise ServiceError(f"{what} works while a loss hook is called, and none is")
    return current


def get_log_probs_and_entropy(logits: Any, *, with_entropy: bool = False, **kwargs: Any) -> dict[str, list[Any]]:
    """Return `log_probs`, and `entropy` if asked for: one 1-D tensor of response length for each sample.

    Callable inside a loss hook; lengths and tokens are those of the batch that the hook was called with.
    """
    log_probs, entropy = _current("get_log_probs_and_entropy")[0](logits, entropy=with_entropy)
    return {"log_probs": log_probs, "entropy": entropy} if with_entropy else {"log_probs": log_probs}


def slime_log_probs_and_entropy(
    logits: Any, *, with_entropy: bool = False, **kwargs: Any
) -> tuple[Any, dict[str, list[Any]]]:
    """As `get_log_probs_and_entropy`, behind an empty first part."""
    return logits.new_empty((0,)), get_log_probs_and_entropy(logits, with_entropy=with_entropy, **kwargs)


def get_parallel_state() -> Any:
    """Return this rank's place; callable inside a loss hook."""
    return _current("get_parallel_state")[1]


def all_gather_with_cp(tensor: Any, total_length: int, response_length: int, *others: Any, **kwargs: Any) -> Any:
    """Return `tensor`: it holds the whole response on every rank."""
    return tensor


def slice_log_prob_with_cp(log_prob: Any, total_length: int, response_length: int, *others: Any, **kwargs: Any) -> Any:
    """Return `log_prob`: every rank works on whole responses."""
    return log_prob


def slice_with_cp(tokens: Any, pad_value: Any, *others: Any, **kwargs: Any) -> Any:
    """Return `tokens`: every rank works on whole sequences."""
    return tokens


def get_local_response_loss_masks(
    total_lengths: list[int], response_lengths: list[int], loss_masks: list[Any], *others: Any, **kwargs: Any
) -> list[Any]:
    """Return `loss_masks`."""
    return loss_masks


def slice_loss_masks_for_local_cp(
    loss_masks: list[Any], total_lengths: list[int], response_lengths: list[int], *others: Any, **kwargs: Any
) -> list[Any]:
    """Return `loss_masks`."""
    return loss_masks


def get_chunked_loss_masks(
    total_lengths: list[int], response_lengths: list[int], loss_masks: list[Any], *others: Any, **kwargs: Any
) -> tuple[list[Any], list[int]]:
    """Return the masks and their lengths."""
    return loss_masks, response_lengths


def get_sum_of_sample_mean(
    total_lengths: list[int],
    response_lengths: list[int],
    loss_masks: list[Any],
    calculate_per_token_loss: bool = False,
    *others: Any,
    **kwargs: Any,
) -> Callable[[Any], Any]:
    """Return the function that adds up per-token values: each sample's masked mean, or the masked tokens."""

    def reduce(values: Any) -> Any:
        masked = [part * mask for part, mask in zip(values.split(response_lengths, dim=0), loss_masks, strict=True)]
        if calculate_per_token_loss:
            return sum(part.sum() for part in masked)
        return sum(part.sum() / mask.sum().clamp_min(1) for part, mask in zip(masked, loss_masks, strict=True))

    return reduce


def compute_policy_loss(
    ppo_kl: Any, advantages: Any, eps_clip: float, eps_clip_high: float, eps_clip_c: float | None = None
) -> tuple[Any, Any]:
    """Return PPO's clipped loss and where it was clipped, per token; `ppo_kl` is old minus new log-probs.

    `eps_clip_c` bounds the loss of tokens with a negative advantage (dual clip, arXiv 1912.09729).
    """
    ratio = (-ppo_kl).exp()
    plain = -ratio * advantages
    clipped = -ratio.clamp(1 - eps_clip, 1 + eps_clip_high) * advantages
    loss = plain.maximum(clipped)
    if eps_clip_c is not None:
        loss = loss.minimum(-eps_clip_c * advantages).where(advantages < 0, loss)
    return loss, (clipped > plain).to(loss.dtype)


def compute_approx_kl(log_probs: Any, log_probs_base: Any, kl_loss_type: str, importance_ratio: Any = None) -> Any:
    """Estimate KL(policy ‖ base) per token: `k1`, `k2`, `k3`, or `low_var_kl`, which is k3 within ±10."""
    gap = log_probs.float() - log_probs_base.float()
    if kl_loss_type not in ("k1", "k2", "k3", "low_var_kl"):
        raise ValueError(f"kl_loss_type {kl_loss_type!r} is none of k1, k2, k3, low_var_kl")
    kl = {"k1": lambda: gap, "k2": lambda: gap.square() / 2}.get(kl_loss_type, lambda: gap + (-gap).expm1())()
    if importance_ratio is not None:
        kl = kl * importance_ratio
    return kl.clamp(-10, 10) if kl_loss_type == "low_var_kl" else kl
