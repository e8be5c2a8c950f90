"""AdamW with Megatron's optimizers below: plain fp32, bf16 with fp32 masters, or sharded over data-parallel ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from miles_api.errors import MilesError

from .core import (
    DistributedDataParallel,
    OptimizerConfig,
    OptimizerParamScheduler,
    clip_grad_by_total_norm_fp32,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from .cpu import has_gpu

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_train.options import OptimizerOptions, ParallelOptions

__all__ = ["Optimizer", "build_optimizer"]


class Optimizer:
    """Megatron's optimizer and learning-rate schedule for one model."""

    def __init__(self, model: list[DistributedDataParallel], inner: Any, scheduler: Any, clip_grad: float) -> None:
        """Use `build_optimizer`."""
        self.model = model
        self.inner = inner
        """Megatron's ChainedOptimizer."""
        self.scheduler = scheduler
        """Megatron's OptimizerParamScheduler; its `num_steps` counts the steps taken."""
        self._clip_grad = clip_grad

    @property
    def learning_rate(self) -> float:
        """Return the learning rate that the next step will use."""
        return self.inner.param_groups[0]["lr"]

    @property
    def is_sharded(self) -> bool:
        """Say whether each data-parallel rank holds a part of its state alone (`--use-distributed-optimizer`)."""
        return self.inner.chained_optimizers[0].config.use_distributed_optimizer

    @property
    def steps(self) -> int:
        """Return how many steps were taken."""
        return self.scheduler.num_steps

    def zero_grad(self) -> None:
        """Zero the gradients. `forward.run` does it before a backward pass, so a train loop need not."""
        for chunk in self.model:
            chunk.zero_grad_buffer()
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self) -> tuple[bool, float]:
        """Clip, update the weights and advance the schedule; call after `forward.run` with gradients.

        Returns whether the update was made and the global gradient norm before clipping, the same on all ranks. Raises
        MilesError naming a parameter when the norm is NaN or infinite; the weights are then as they were.
        """
        try:
            found_inf = self.inner.prepare_grads()
            norm = float("inf") if found_inf else float(self.inner.get_grad_norm())
            if not math.isfinite(norm):
                raise MilesError(f"gradient norm is {norm}: {self._first_not_finite()}; the weights were not updated")
            if self._clip_grad > 0:
                for optimizer in self.inner.chained_optimizers:
                    clip_grad_by_total_norm_fp32(optimizer.get_parameters(), self._clip_grad, norm)
            updated = bool(self.inner.step_with_ready_grads())
        finally:
            # prepare_grads made `grad` an alias of `main_grad`; left in place, the next backward pass counts twice
            self.inner.zero_grad()
        if updated:
            self.scheduler.step(increment=1)
        return updated, norm

    def sharded_state(self, weights: dict[str, Any], metadata: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """Return what a checkpoint holds of the optimizer, in Megatron's sharded form."""
        for optimizer, parameter in self._torch_parameters():
            if not optimizer.state.get(parameter):
                # Megatron expects moments and counter, also before the first step
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        inner = self.inner.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
        return {"inner": inner, "steps": self.steps}

    def load_sharded_state(self, state: dict[str, Any]) -> None:
        """Take a loaded state; learning rate, schedule, betas and decay stay those of this run's options."""
        options = [{k: v for k, v in group.items() if k not in ("params", "step")} for group in self.inner.param_groups]
        for moments in (state["inner"], state["inner"].get("optimizer", {})):
            if "state" in moments and any(self._torch_parameters()):
                # left out by Megatron when it is 0, and required by torch
                moments["state"].setdefault("common_step", torch.tensor(float(state["steps"])))
        self.inner.load_state_dict(state["inner"])
        for group, own in zip(self.inner.param_groups, options, strict=True):
            group.update(own)
        self.scheduler.num_steps = 0
        self.scheduler.step(increment=state["steps"])
        for optimizer, parameter in self._torch_parameters():
            # Megatron does not store torch's counter in every layout, and one that is off biases not the first update
            # after a load but the second
            optimizer.state[parameter]["step"] = torch.tensor(float(self.steps))

    def _torch_parameters(self) -> Iterator[tuple[torch.optim.AdamW, torch.nn.Parameter]]:
        for optimizer in self.inner.chained_optimizers:
            if isinstance(optimizer.optimizer, torch.optim.AdamW):
                for group in optimizer.optimizer.param_groups:
                    for parameter in group["params"]:
                        yield optimizer.optimizer, parameter

    def _first_not_finite(self) -> str:
        for chunk in self.model:
            for name, parameter in chunk.named_parameters():
                if not parameter.requires_grad:
                    continue
                gradient = parameter.main_grad  # pyrefly: ignore[missing-attribute]  set by Megatron's DDP
                bad = int((~torch.isfinite(gradient)).sum())
                if bad:
                    plain = name.removeprefix("module.").removeprefix("module.")
                    return f"{bad} of {parameter.numel()} gradients of {plain} {tuple(parameter.shape)} are not finite"
        return "every gradient on this rank is finite, another rank has one that is not"


def build_optimizer(
    model: list[DistributedDataParallel], options: OptimizerOptions, parallel: ParallelOptions, *, total_steps: int
) -> Optimizer:
    """Build the optimizer of a loaded model; `total_steps` is where a learning-rate decay ends.

    Weight decay applies to matrices, not to norms and biases.
    """
    dtype = model[0].config.params_dtype
    min_lr = min(options.min_lr, options.lr)
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
    )
    inner = get_megatron_optimizer(
        config, [*model], get_standard_config_overrides(config), use_gloo_process_groups=has_gpu()
    )
    if not has_gpu():
        # one kernel per tensor instead of a dozen; same arithmetic
        for group in inner.param_groups:
            group["fused"] = True
    scheduler = OptimizerParamScheduler(
        inner,
        init_lr=0.0 if options.lr_warmup_iters else options.lr,
        max_lr=options.lr,
        min_lr=min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=max(total_steps, options.lr_warmup_iters + 1),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=max(total_steps, 1),
        wd_incr_style="constant",
    )
    return Optimizer(model, inner, scheduler, options.clip_grad)
