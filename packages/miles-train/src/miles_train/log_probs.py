"""Log-probs of response tokens and the entropy of their distributions, exact under a vocabulary split over TP ranks."""

# ruff: noqa: N803, N806  the shape suffixes
# B samples, T packed tokens of the micro-batch, R response tokens of it, V (local) vocabulary

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["log_probs_and_entropy", "packed_log_probs_and_entropy", "response_rows"]


def log_probs_and_entropy(
    logits_TV: Tensor,
    tokens: Sequence[Tensor],
    response_lengths: Sequence[int],
    temperature: float,
    *,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[list[Tensor], list[Tensor] | None]:
    """Return each sample's response log-probs, and the entropies if asked: 1-D fp32 tensors, differentiable.

    Called by every loss and by the pass that computes old log-probs. `logits_TV` are the rows of the packed sequences
    `tokens` (rows after their end are ignored) and are left as they were; with a `tp_group` of more than one rank, V
    is this rank's part of the vocabulary. Logits are divided by `temperature` first, as engines do. Only rows that
    predict a response token are touched; fp64 logits give fp64 results.
    """
    log_probs_R, entropy_R = packed_log_probs_and_entropy(
        logits_TV, tokens, response_lengths, temperature, entropy=entropy, tp_group=tp_group
    )
    lengths = list(response_lengths)
    return list(log_probs_R.split(lengths)), None if entropy_R is None else list(entropy_R.split(lengths))


def packed_log_probs_and_entropy(
    logits_TV: Tensor,
    tokens: Sequence[Tensor],
    response_lengths: Sequence[int],
    temperature: float,
    *,
    entropy: bool = False,
    tp_group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return what `log_probs_and_entropy` returns with the samples concatenated, two tensors of shape (R,)."""
    rows_R, targets_R = response_rows(tokens, response_lengths)
    group = tp_group if tp_group is not None and dist.get_world_size(tp_group) > 1 else None
    return _ResponseLogProbs.apply(logits_TV, rows_R, targets_R, temperature, entropy, group)


def response_rows(tokens: Sequence[Tensor], response_lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the packed rows that predict response tokens and the tokens they predict, both int64 of length R.

    The token at packed position p is predicted by row p - 1; the first response token of a sample by the last row of
    its prompt.
    """
    tokens_T = torch.cat(list(tokens))
    rows: list[int] = []
    end = 0
    for sequence, length in zip(tokens, response_lengths, strict=True):
        end += len(sequence)
        rows.extend(range(end - length - 1, end - 1))
    rows_R = torch.tensor(rows, dtype=torch.int64, device=tokens_T.device)
    return rows_R, tokens_T.index_select(0, rows_R + 1)


class _ResponseLogProbs(torch.autograd.Function):
    """Log-softmax at chosen tokens and entropy, for chosen rows; one max and one sum all-reduce over the TP group."""

    @staticmethod
    def forward(
        ctx: Any,
        logits_TV: Tensor,
        rows_R: Tensor,
        targets_R: Tensor,
        temperature: float,
        entropy: bool,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor | None]:
        scaled_RV = logits_TV.index_select(0, rows_R)  # a copy: everything below may work in place
        if scaled_RV.dtype != torch.float64:
            scaled_RV = scaled_RV.float()
        if temperature != 1.0:
            scaled_RV /= temperature
        max_R = scaled_RV.amax(-1)
        if group is not None:
            dist.all_reduce(max_R, op=dist.ReduceOp.MAX, group=group)
        scaled_RV -= max_R.unsqueeze(-1)
        here_R, local_R = None, targets_R
        if group is not None:
            local_R = targets_R - dist.get_rank(group) * logits_TV.shape[1]
            here_R = (local_R >= 0) & (local_R < logits_TV.shape[1])
            local_R = local_R.clamp(0, logits_TV.shape[1] - 1)
        target_R = scaled_RV.gather(-1, local_R.unsqueeze(-1)).squeeze(-1)
        if here_R is not None:
            target_R = target_R.where(here_R, 0.0)
        exp_RV = scaled_RV.exp()
        parts = [target_R, exp_RV.sum(-1)]
        if entropy:
            # Where exp underflows to 0 the product must be 0 too, even for a logit of -inf. As a product of matrices it
            # needs no third tensor of this size.
            scaled_RV.clamp_(min=torch.finfo(scaled_RV.dtype).min)
            parts.append(torch.bmm(exp_RV.unsqueeze(1), scaled_RV.unsqueeze(2)).flatten())
        if group is not None:
            packed = torch.stack(parts)
            dist.all_reduce(packed, group=group)
            parts = list(packed.unbind(0))
        log_sum_R = parts[1].log()
        log_probs_R = parts[0] - log_sum_R
        entropy_R = log_sum_R - parts[2] / parts[1] if entropy else None
        probs_RV = exp_RV.div_(parts[1].unsqueeze(-1))
        ctx.save_for_backward(probs_RV, rows_R, local_R, here_R, entropy_R)
        # An entropy that is only looked at costs no backward pass.
        ctx.set_materialize_grads(False)
        ctx.temperature, ctx.shape, ctx.dtype = temperature, logits_TV.shape, logits_TV.dtype
        return log_probs_R, entropy_R

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad_log_probs_R: Tensor | None, grad_entropy_R: Tensor | None) -> tuple[Tensor | None, ...]:
        probs_RV, rows_R, local_R, here_R, entropy_R = ctx.saved_tensors
        if grad_log_probs_R is None:
            grad_log_probs_R = probs_RV.new_zeros(len(probs_RV))
        grad_RV = probs_RV * -grad_log_probs_R.unsqueeze(-1)
        on_target_R = grad_log_probs_R if here_R is None else grad_log_probs_R * here_R
        grad_RV.scatter_add_(-1, local_R.unsqueeze(-1), on_target_R.unsqueeze(-1))
        if entropy_R is not None and grad_entropy_R is not None:
            # dH/dx = -p (log p + H)
            pull_RV = torch.xlogy(probs_RV, probs_RV).addcmul_(probs_RV, entropy_R.unsqueeze(-1))
            grad_RV.addcmul_(pull_RV, grad_entropy_R.unsqueeze(-1), value=-1)
        if ctx.temperature != 1.0:
            grad_RV /= ctx.temperature
        grad_TV = torch.zeros(ctx.shape, dtype=ctx.dtype, device=grad_RV.device)
        grad_TV.index_copy_(0, rows_R, grad_RV.to(ctx.dtype))  # a row predicts one token: no row appears twice
        return grad_TV, None, None, None, None, None
