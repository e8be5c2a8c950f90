"""Forward and backward over packed micro-batches."""

# ruff: noqa: N803, N806  the shape suffixes
# T packed tokens of a micro-batch, R response tokens of it, N = T or R, V vocabulary of this tensor-parallel rank,
# B sequences, H hidden size

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from miles_train.log_probs import Rows, response_rows

from .attention import Layout
from .core import (
    ColumnParallelLinear,
    PackedSeqParams,
    gather_from_sequence_parallel_region,
    get_forward_backward_func,
    parallel_state,
    unwrap,
)
from .cpu import has_gpu
from .init import device

__all__ = ["LossStep", "MicroBatch", "run"]

MicroBatch = dict[str, Any]
LossStep = Callable[[Tensor, MicroBatch], tuple[Tensor | None, dict[str, Any]]]


def run(
    model: list[Any],
    micro_batches: list[MicroBatch],
    loss_step: LossStep,
    *,
    forward_only: bool,
    rows: Rows = "all",
) -> list[dict[str, Any]]:
    """Run the model over micro-batches, and its gradient unless `forward_only`.

    `micro_batch["tokens"]` is a list of 1-D int64 tensors, whole sequences (prompt and response). On the last pipeline
    stage `loss_step(logits_NV, micro_batch)` gets the logits of the packed tokens, (sum of lengths, vocabulary / TP),
    in the model's dtype, and returns a loss to differentiate (or None) and a dict of detached results. The dicts are
    returned in order; other stages return an empty list. With `rows="response"` the logits are those of the rows that
    predict the last `micro_batch["response_lengths"]` tokens of each sequence, in the order of
    `log_probs.response_rows`, and the output layer computes no others.

    The loss must already be divided by its denominators: gradients are zeroed here first, then *summed* over
    micro-batches and over data-parallel ranks, with no other scaling. When this returns they are complete in
    `parameter.main_grad`: call `Optimizer.step` next. Without a pipeline the ranks may have different numbers of
    micro-batches, also 0; with one, those of a pipeline need the same number.
    """
    chunk = model[0]
    chunk.train(not forward_only)
    if not forward_only:
        chunk.zero_grad_buffer()
    schedule = partial(
        _direct if parallel_state.get_pipeline_model_parallel_world_size() == 1 else _pipelined, rows=rows
    )
    if forward_only:
        with torch.no_grad():
            return schedule(model, micro_batches, loss_step, forward_only=True)
    return schedule(model, micro_batches, loss_step, forward_only=False)


def _direct(
    model: list[Any], micro_batches: list[MicroBatch], loss_step: LossStep, *, forward_only: bool, rows: Rows
) -> list:
    results = []
    for micro_batch in micro_batches:
        loss, result = loss_step(_logits(model[0], micro_batch, rows), micro_batch)
        results.append(result)
        if not forward_only and loss is not None:
            loss.backward()
        # frees the graph before the next micro-batch builds its own
        del loss
    # alone there is nobody to sum with, and Megatron would still call the collectives
    if not forward_only and dist.get_world_size() > 1:
        model[0].config.finalize_model_grads_func(model)
    return results


def _pipelined(
    model: list[Any], micro_batches: list[MicroBatch], loss_step: LossStep, *, forward_only: bool, rows: Rows
) -> list:
    if not micro_batches:
        return []

    def forward_step(batches: Iterator[MicroBatch], chunk: Any) -> tuple[Tensor, Callable[..., Any]]:
        micro_batch = next(batches)
        output = _logits(chunk, micro_batch, rows)

        def finish(logits_NV: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
            loss, result = loss_step(logits_NV, micro_batch)
            if loss is None:
                # earlier stages wait for a gradient, so there must be one
                loss = torch.zeros((), device=logits_NV.device) if forward_only else logits_NV.sum() * 0.0
            return loss, torch.zeros((), dtype=torch.int), result

        return output, finish

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(micro_batches),
        model=model,
        num_microbatches=len(micro_batches),
        # variable_seq_lengths: stages tell each other the shape of each micro-batch
        seq_length=1,
        micro_batch_size=1,
        forward_only=forward_only,
    )


def _logits(chunk: Any, micro_batch: MicroBatch, rows: Rows) -> Tensor:
    """Run this rank's stage; the result is logits (N, V) on the last stage, hidden states (T, 1, H) before it."""
    packed, packing = _pack(micro_batch["tokens"], chunk.config)
    kwargs = {} if chunk.config.params_dtype == torch.float32 else {"fp32_output": False}
    stage = partial(chunk, **packed, attention_mask=None, packed_seq_params=packing, **kwargs)
    if not parallel_state.is_pipeline_last_stage():
        return stage()
    if rows == "response":
        rows_R = response_rows(micro_batch["tokens"], micro_batch["response_lengths"]).to(device())
        with _only(unwrap([chunk]).output_layer, rows_R):
            logits_NV = stage().squeeze(0)
        # what stands in the place of Megatron's layer, a critic's head for instance, has computed all rows
        return logits_NV if len(logits_NV) == len(rows_R) else logits_NV.index_select(0, rows_R)
    logits_NV, total = stage().squeeze(0), sum(len(tokens) for tokens in micro_batch["tokens"])
    # sequence parallelism pads the pack to a multiple of its ranks
    return logits_NV if len(logits_NV) == total else logits_NV[:total]


@contextmanager
def _only(head: torch.nn.Module, rows_R: Tensor) -> Iterator[None]:
    """Give Megatron's output layer only these rows of the hidden states inside the block; leave another head alone."""
    if not isinstance(head, ColumnParallelLinear):
        yield
        return
    scattered = head.sequence_parallel

    def select(_head: torch.nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_T1H, *others = inputs
        if scattered:
            # the layer sums the gradient over its ranks, each of which then keeps that of its own rows
            hidden_T1H = gather_from_sequence_parallel_region(hidden_T1H, tensor_parallel_output_grad=False)
        return hidden_T1H.index_select(0, rows_R), *others

    hook = head.register_forward_pre_hook(select)
    # each rank has a part of the rows, which the layer would gather itself
    head.sequence_parallel = False
    try:
        yield
    finally:
        hook.remove()
        head.sequence_parallel = scattered


def _pack(sequences: list[Tensor], config: Any) -> tuple[dict[str, Tensor], Any]:
    lengths = [len(tokens) for tokens in sequences]
    tokens_T = torch.cat(sequences)
    short = -len(tokens_T) % config.tensor_model_parallel_size if config.sequence_parallel else 0
    if short:
        tokens_T, lengths = functional.pad(tokens_T, (0, short)), [*lengths, short]
    layout = Layout(lengths)
    ends_B = functional.pad(torch.tensor(lengths, dtype=torch.int32).cumsum(0, dtype=torch.int32), (1, 0)).to(device())
    # the longest sequence, never the total: given the total, Megatron takes RoPE positions to be global
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends_B,
        cu_seqlens_kv=ends_B,
        max_seqlen_q=layout.longest,
        max_seqlen_kv=layout.longest,
    )
    if not has_gpu():
        packing.layout = layout  # pyrefly: ignore[missing-attribute]  read by `PackedAttention`, passed on by Megatron
    inputs = {"input_ids": tokens_T, "position_ids": layout.positions_T}
    return {name: value.unsqueeze(0).to(device()) for name, value in inputs.items()}, packing
