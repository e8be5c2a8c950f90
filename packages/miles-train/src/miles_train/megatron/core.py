"""The door to Megatron-Core: importing it from here makes sure that the CPU shims come first."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from .cpu import apply_cpu_shims

apply_cpu_shims()
with warnings.catch_warnings():
    # it says at import that Apex and Transformer Engine are missing: on a CPU that is the point
    warnings.simplefilter("ignore")
    from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
    from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        gather_from_sequence_parallel_region,
    )
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "MLP",
    "ColumnParallelLinear",
    "DistributedDataParallel",
    "DistributedDataParallelConfig",
    "Float16Module",
    "GPTModel",
    "MLPSubmodules",
    "OptimizerConfig",
    "OptimizerParamScheduler",
    "PackedSeqParams",
    "ProcessGroupCollection",
    "RowParallelLinear",
    "TransformerBlockSubmodules",
    "TransformerConfig",
    "clip_grad_by_total_norm_fp32",
    "dist_checkpointing",
    "finalize_model_grads",
    "gather_from_sequence_parallel_region",
    "get_forward_backward_func",
    "get_gpt_layer_local_spec",
    "get_gpt_layer_with_transformer_engine_spec",
    "get_megatron_optimizer",
    "get_num_layers_to_build",
    "get_standard_config_overrides",
    "parallel_state",
    "tensor_parallel",
    "unwrap",
]


def unwrap(model: Sequence[Any]) -> Any:
    """Return the GPTModel inside DDP and the mixed-precision wrapper."""
    module = model[0]
    while isinstance(module, (DistributedDataParallel, Float16Module)):
        module = module.module
    return module
