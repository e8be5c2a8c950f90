"""Log-probs of response tokens and the entropy of their distributions, exact under a vocabulary split over TP ranks.

Beside the logits and their gradient there is never more than a few chunks of rows of that width: the softmax is not
kept for the backward pass but computed again, from two numbers a row.
"""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, T packed tokens of the micro-batch, R response tokens of it, N = T or R, C rows of a chunk, V (local)
# vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["Rows", "log_probs_and_entropy", "packed_log_probs_and_entropy", "response_rows"]

Rows = Literal["all", "response"]
"""Which rows of the packed sequences logits have: one for every token, or those of `response_rows` alone."""

_CACHED = 2**19
"""Numbers of a chunk on a CPU, about half of a core's cache: chunks beyond it take twice the time."""
_FLOOR = -1e4
"""A log-ratio whose exp is 0 in any type, and which stays finite when multiplied."""


def log_probs_and_entropy(
    logits_NV: Tensor,
    tokens: Sequence[Tensor],
    response_lengths: Sequence[int],
    temperature: float,
    *,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    rows: Rows = "all",
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return each sample's response log-probs, and the entropies if asked: 1-D fp32 tensors, differentiable.

    Called by every loss and by the pass that computes old log-probs. `logits_NV` are the rows of the packed sequences
    `tokens`, or with `rows="response"` those of `response_rows`; rows after their end are ignored, and all are left as
    they were. With a `tp_group` of more than one rank, V is this rank's part of the vocabulary. Logits are divided by
    `temperature` first, as engines do. At most `chunk_size` rows are worked on at a time (None: any number), on a CPU
    no more than stay in its cache. Only rows that predict a response token are touched; fp64 logits give fp64 results.
    """
    log_probs_R, entropy_R = packed_log_probs_and_entropy(
        logits_NV,
        tokens,
        response_lengths,
        temperature,
        entropy=entropy,
        tp_group=tp_group,
        chunk_size=chunk_size,
        rows=rows,
    )
    lengths = list(response_lengths)
    return list(log_probs_R.split(lengths)), None if entropy_R is None else list(entropy_R.split(lengths))


def packed_log_probs_and_entropy(
    logits_NV: Tensor,
    tokens: Sequence[Tensor],
    response_lengths: Sequence[int],
    temperature: float,
    *,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
    rows: Rows = "all",
) -> tuple[Tensor, Tensor | None]:
    """Return what `log_probs_and_entropy` returns with the samples concatenated, two tensors of shape (R,)."""
    targets_R = torch.cat([sequence[len(sequence) - n :] for sequence, n in zip(tokens, response_lengths, strict=True)])
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    rows_R = None if rows == "response" else response_rows(tokens, response_lengths)
    return _ResponseLogProbs.apply(logits_NV, rows_R, targets_R, temperature, entropy, group, chunk_size)


def response_rows(tokens: Sequence[Tensor], response_lengths: Sequence[int]) -> Tensor:
    """Return the packed rows that predict response tokens, int64 of length R.

    The token at packed position p is predicted by row p - 1; the first response token of a sample by the last row of
    its prompt.
    """
    rows: list[int] = []
    end = 0
    for sequence, length in zip(tokens, response_lengths, strict=True):
        end += len(sequence)
        rows.extend(range(end - length - 1, end - 1))
    return torch.tensor(rows, dtype=torch.int64, device=tokens[0].device)


class _ResponseLogProbs(torch.autograd.Function):
    """Log-softmax at chosen tokens and entropy, for chosen rows; one max and one sum all-reduce over the TP group."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        rows_R: Tensor | None,
        targets_R: Tensor,
        temperature: float,
        entropy: bool,
        group: dist.ProcessGroup | None,
        chunk_size: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        here_R, local_R = None, targets_R
        if group is not None:
            width = logits_NV.shape[1]
            local_R = targets_R - dist.get_rank(group) * width
            here_R = (local_R >= 0) & (local_R < width)
            local_R = local_R.clamp_(0, width - 1)
        max_R, sums = _scan(logits_NV, rows_R, local_R, temperature, entropy, chunk_size)
        if here_R is not None:
            _join(max_R, sums, here_R, group)
        target_R, sum_R, *product_R = sums.unbind(0)
        log_sum_R = sum_R.log()
        log_probs_R = target_R - log_sum_R
        entropy_R = log_sum_R - product_R[0] / sum_R if entropy else None
        ctx.save_for_backward(logits_NV, rows_R, local_R, here_R, max_R, sum_R.clone(), entropy_R)
        # An entropy that is only looked at costs no backward pass.
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        return log_probs_R, entropy_R

    @staticmethod
    @once_differentiable
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad_log_probs_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        logits_NV, rows_R, local_R, here_R, max_R, sum_R, entropy_R = ctx.saved_tensors
        pull_R = torch.zeros_like(sum_R) if grad_log_probs_R is None else grad_log_probs_R / ctx.temperature
        on_target_R = pull_R if here_R is None else pull_R * here_R
        # With p = exp(x) / sum and x the log-ratio to the largest: d log p_t = [t] - p, dH = -p (x - log sum + H),
        # together p (constant + slope x).
        constant_R, slope_R = -pull_R, None
        if grad_entropy_R is not None:
            slope_R = grad_entropy_R / -ctx.temperature
            constant_R = constant_R + slope_R * (entropy_R - sum_R.log())
            slope_R = slope_R / sum_R
        constant_R = constant_R / sum_R
        grad_NV = (torch.empty_like if rows_R is None else torch.zeros_like)(logits_NV)
        for at, logits_CV in _chunks(logits_NV, rows_R, len(local_R), ctx.chunk_size):
            # Where rows and types allow it the gradient is computed in its place.
            in_place = rows_R is None and grad_NV.dtype == sum_R.dtype
            out_CV = grad_NV[at] if in_place else None
            ratio_CV = _log_ratios(logits_CV, max_R[at], ctx.temperature, out_CV)
            if slope_R is None:
                grad_CV = ratio_CV.exp_().mul_(constant_R[at].unsqueeze(-1))
            else:
                exp_CV = ratio_CV.exp()
                grad_CV = ratio_CV.clamp_(min=_FLOOR).mul_(slope_R[at].unsqueeze(-1))
                grad_CV.add_(constant_R[at].unsqueeze(-1)).mul_(exp_CV)
            grad_CV.scatter_add_(-1, local_R[at].unsqueeze(-1), on_target_R[at].unsqueeze(-1))
            if rows_R is not None:
                grad_NV.index_copy_(0, rows_R[at], grad_CV.to(grad_NV.dtype))  # no row predicts two tokens
            elif not in_place:
                grad_NV[at] = grad_CV
        if rows_R is None:
            grad_NV[len(local_R) :].zero_()
        return grad_NV, None, None, None, None, None, None


def _chunks(
    logits_NV: Tensor, rows_R: Tensor | None, count: int, chunk_size: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Yield which of the `count` rows a chunk has, and their logits."""
    size = chunk_size or max(count, 1)
    if logits_NV.device.type == "cpu":
        size = min(size, max(1, _CACHED // logits_NV.shape[1]))
    for start in range(0, count, size):
        at = slice(start, min(start + size, count))
        yield at, logits_NV[at] if rows_R is None else logits_NV.index_select(0, rows_R[at])


def _log_ratios(logits_CV: Tensor, max_C: Tensor, temperature: float, out_CV: Tensor | None = None) -> Tensor:
    """Return logits / temperature - max in the type of `max_C`, in a tensor that may be worked on in place."""
    if temperature == 1.0:
        return torch.sub(logits_CV, max_C.unsqueeze(-1), out=out_CV)
    return torch.div(logits_CV.to(max_C.dtype), temperature, out=out_CV).sub_(max_C.unsqueeze(-1))


def _scan(
    logits_NV: Tensor,
    rows_R: Tensor | None,
    local_R: Tensor,
    temperature: float,
    entropy: bool,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """Return each row's largest scaled logit, and a tensor (2 or 3, R).

    With x the log-ratios to the largest, its rows are x at the target, the sum of exp(x), and for the entropy that of
    x exp(x).
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    max_R = logits_NV.new_empty(len(local_R), dtype=dtype)
    sums = max_R.new_empty(3 if entropy else 2, len(local_R))
    for at, logits_CV in _chunks(logits_NV, rows_R, len(local_R), chunk_size):
        # A rank's whole part of the vocabulary may be impossible: its largest logit must be a number all the same.
        max_R[at] = (logits_CV.amax(-1).to(dtype) / temperature).clamp_(min=torch.finfo(dtype).min)
        ratio_CV = _log_ratios(logits_CV, max_R[at], temperature)
        sums[0, at] = ratio_CV.gather(-1, local_R[at].unsqueeze(-1)).squeeze(-1)
        if entropy:
            exp_CV = ratio_CV.exp()
            # Where exp underflows to 0 the product must be 0 too, even for a logit of -inf. As a product of matrices it
            # needs no third tensor of this size.
            ratio_CV.clamp_(min=_FLOOR)
            sums[2, at] = torch.bmm(exp_CV.unsqueeze(1), ratio_CV.unsqueeze(2)).flatten()
        else:
            exp_CV = ratio_CV.exp_()
        sums[1, at] = exp_CV.sum(-1)
    return max_R, sums


def _join(max_R: Tensor, sums: Tensor, here_R: Tensor, group: dist.ProcessGroup | None) -> None:
    """Turn what `_scan` found in this rank's part of the vocabulary into what it would find in the whole, in place.

    `here_R` says which targets are in this part. All ranks have the same rows, hence the same two collectives.
    """
    largest_R = max_R.clone()
    dist.all_reduce(max_R, op=dist.ReduceOp.MAX, group=group)
    shift_R = largest_R - max_R
    target_R, sum_R, *product_R = sums.unbind(0)
    target_R.copy_((target_R + shift_R).where(here_R, 0.0))
    shift_R.clamp_(min=_FLOOR)
    for values_R in product_R:
        values_R.addcmul_(shift_R, sum_R).mul_(shift_R.exp())
    sum_R.mul_(shift_R.exp())
    dist.all_reduce(sums, group=group)
