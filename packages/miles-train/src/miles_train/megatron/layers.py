"""Layers for models without Transformer Engine: on a CPU the elementwise work costs more than the matrix products, so
each of these does its forward and its gradient in as few passes over memory as torch's kernels allow."""

# ruff: noqa: N803, N806  the shape suffixes
# N rows (tokens, or tokens × heads), H features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .core import MLP, ColumnParallelLinear, MLPSubmodules, RowParallelLinear, parallel_state

__all__ = ["GatedMLP", "RMSNorm"]


class RMSNorm(torch.nn.Module):
    """Divide by the root mean square over the last dimension and scale.

    Usable under sequence parallelism, which Megatron's torch norm refuses: it only takes marking the weight for the
    gradient all-reduce.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` normalised, same shape and dtype."""
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_H: Tensor, eps: float) -> Tensor:
        x_NH = x.reshape(-1, x.shape[-1])
        mean_square_N1 = torch.linalg.vector_norm(x_NH, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        inverse_N1 = mean_square_N1.add_(eps).rsqrt_()
        ctx.save_for_backward(x_NH, weight_H, inverse_N1)
        return torch.mul(x_NH, inverse_N1).mul_(weight_H).view(x.shape)

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x_NH, weight_H, inverse_N1 = ctx.saved_tensors
        grad_NH = grad.reshape(x_NH.shape)
        product_NH = grad_NH * x_NH
        grad_weight_H = inverse_N1.squeeze(1) @ product_NH
        projection_N1 = (product_NH @ weight_H).unsqueeze(1).mul_(inverse_N1.pow(3)).div_(x_NH.shape[1])
        grad_x_NH = torch.mul(grad_NH, weight_H, out=product_NH).mul_(inverse_N1)
        return grad_x_NH.addcmul_(x_NH, projection_N1, value=-1).view(grad.shape), grad_weight_H, None


class GatedMLP(MLP):
    """Megatron's MLP with SwiGLU in one autograd node; same parameters and checkpoints."""

    def __init__(self, config: Any) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
        )

    def forward(self, hidden_states: Tensor, *_unused: Any, **_also_unused: Any) -> tuple[Tensor, None]:
        """Return the output and, in the place of the bias to be added later, None."""
        gate_up, _ = self.linear_fc1(hidden_states)
        output, _ = self.linear_fc2(_SwiGLU.apply(gate_up))
        return output, None


class _SwiGLU(torch.autograd.Function):
    """silu(gate) · up, of a tensor whose last dimension is [gate, up]."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        activated = functional.silu(gate)
        ctx.save_for_backward(gate_up, activated)
        return activated * up

    @staticmethod
    # pyrefly: ignore[bad-override]  one gradient for each output, not any number
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        gate_up, activated = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grad_gate_up = torch.empty_like(gate_up)
        grad_gate, grad_up = grad_gate_up.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_up)
        torch.ops.aten.silu_backward.grad_input(grad * up, gate, grad_input=grad_gate)
        return grad_gate_up
