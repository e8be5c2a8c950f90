"""Build Megatron's GPT model for a Hugging Face checkpoint: local layers on a CPU, Transformer Engine on GPUs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from miles_api.errors import HookResultError

from . import hf
from .attention import PackedAttention, Rotary
from .core import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    Float16Module,
    GPTModel,
    ProcessGroupCollection,
    TransformerBlockSubmodules,
    TransformerConfig,
    finalize_model_grads,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_num_layers_to_build,
    parallel_state,
)
from .cpu import has_gpu
from .hf_config import HFConfig, check_sizes, parse_hf_config, read_hf_config, read_raw_config
from .layers import GatedMLP, RMSNorm

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_train.options import ParallelOptions

__all__ = ["build_frozen_model", "build_model", "gpt_model", "load_gpt", "trainable"]


def build_model(
    hf_dir: str,
    parallel: ParallelOptions,
    *,
    param_dtype: torch.dtype = torch.float32,
    provider: Callable[..., Any] | None = None,
) -> list[DistributedDataParallel]:
    """Build this rank's part of the model in `hf_dir`, to be trained, and load its weights.

    Called after `init.initialize`. Returns a list with one Megatron DDP module, the form that Megatron's functions
    take. Gradients accumulate in fp32 and are summed, not averaged, over data-parallel ranks. On a CPU only float32 is
    meant to be trained: bfloat16 has no native kernels there. `provider` and errors are those of `load_gpt`.
    """
    return trainable(load_gpt(hf_dir, parallel, param_dtype=param_dtype, provider=provider), parallel)


def build_frozen_model(
    hf_dir: str,
    parallel: ParallelOptions,
    *,
    param_dtype: torch.dtype = torch.float32,
    provider: Callable[..., Any] | None = None,
) -> list[torch.nn.Module]:
    """Build this rank's part of a model that is only read, as `build_model` does, but without room for gradients."""
    gpt = load_gpt(hf_dir, parallel, param_dtype=param_dtype, provider=provider)
    return [_mixed_precision(gpt).requires_grad_(False)]


def load_gpt(
    hf_dir: str,
    parallel: ParallelOptions,
    *,
    param_dtype: torch.dtype = torch.float32,
    provider: Callable[..., Any] | None = None,
) -> GPTModel:
    """Return this rank's stage of the model in `hf_dir` with its weights, on its device.

    `provider`, the `model_provider` hook without its `args`, builds the module in the place of `gpt_model`; weights,
    mixed precision and DDP are added here. Raises ConfigError for a model or a parallel size that cannot be built,
    DataError for missing weights, HookResultError when the provider returns no GPTModel.
    """
    hf_config = read_hf_config(hf_dir)
    check_sizes(hf_config, parallel, hf_dir)
    gpt = (provider or gpt_model)(
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        vp_stage=None,
        config=_transformer_config(hf_config, parallel, param_dtype),
        hf_config=read_raw_config(hf_dir),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    if not isinstance(gpt, GPTModel):
        raise HookResultError(f"the model_provider hook must return a GPTModel, it returned a {type(gpt).__name__}")
    if has_gpu():
        gpt.cuda(torch.cuda.current_device())
    hf.load_hf_weights([gpt], hf_dir)
    return gpt


def trainable(gpt: GPTModel, parallel: ParallelOptions) -> list[DistributedDataParallel]:
    """Return a loaded model with buffers for its gradients; what is to be trained must all be in it."""
    return [DistributedDataParallel(gpt.config, _ddp_config(parallel), _mixed_precision(gpt))]


def _mixed_precision(gpt: GPTModel) -> torch.nn.Module:
    return gpt if gpt.config.params_dtype == torch.float32 else Float16Module(gpt.config, gpt)


def gpt_model(
    pre_process: bool,
    post_process: bool,
    vp_stage: int | None = None,
    *,
    config: TransformerConfig,
    hf_config: dict[str, Any],
    pg_collection: ProcessGroupCollection,
    args: Any = None,  # noqa: ARG001  part of the hook's signature
) -> GPTModel:
    """Build the module of one pipeline stage, without weights: the default of `--custom-model-provider-path`.

    A `model_provider` hook may call it with the keywords that it was given, and change the result.

    On GPUs the Transformer Engine layers and Megatron's fused RoPE are used; that branch shares everything but the
    layer spec with the CPU's and has not been run by the CPU test suite.
    """
    numbers = parse_hf_config(hf_config)
    return GPTModel(
        config=config,
        transformer_layer_spec=_gpu_spec(numbers) if has_gpu() else _cpu_spec(numbers, config),
        vocab_size=numbers.vocab_size,
        max_sequence_length=numbers.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=numbers.tied,
        # on a CPU the core attention rotates queries and keys itself
        position_embedding_type="rope" if has_gpu() else "none",
        rotary_base=numbers.rope_theta,  # pyrefly: ignore[bad-argument-type]  any number will do, not only an int
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def _transformer_config(hf_config: HFConfig, parallel: ParallelOptions, param_dtype: torch.dtype) -> TransformerConfig:
    gpu = has_gpu()
    return TransformerConfig(
        num_layers=hf_config.num_layers,
        hidden_size=hf_config.hidden_size,
        ffn_hidden_size=hf_config.ffn_hidden_size,
        num_attention_heads=hf_config.num_heads,
        num_query_groups=hf_config.num_kv_heads,
        kv_channels=hf_config.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=hf_config.rms_norm_eps,
        qk_layernorm=hf_config.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=hf_config.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=param_dtype,
        bf16=param_dtype == torch.bfloat16,
        pipeline_dtype=param_dtype,
        # initialisation marks which weights are split over ranks, so it must run, but the values are loaded next
        init_method=_leave_as_is,
        output_layer_init_method=_leave_as_is,
        use_cpu_initialization=not gpu,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel and parallel.tensor_model_parallel_size > 1,
        # packed micro-batches have a length of their own; Megatron lets pipelines send such shapes only together
        # with this dispatcher, which a dense model never uses
        variable_seq_lengths=True,
        moe_token_dispatcher_type="alltoall",
        # the loss arrives divided by its denominators: this makes DDP sum gradients instead of averaging them
        calculate_per_token_loss=True,
        finalize_model_grads_func=_finalize_grads,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        cuda_graph_scope=[],
        apply_rope_fusion=gpu,
        bias_activation_fusion=gpu,
        bias_dropout_fusion=gpu,
    )


def _leave_as_is(weight: Tensor) -> Tensor:
    return weight


def _finalize_grads(model: list[DistributedDataParallel], _num_tokens: Any = None, **kwargs: Any) -> None:
    """Sum gradients over data-parallel ranks; drops the token count, by which Megatron would divide."""
    finalize_model_grads([*model], None, **kwargs)


def _ddp_config(parallel: ParallelOptions) -> Any:
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=False,
        use_distributed_optimizer=parallel.use_distributed_optimizer,
        # the optimizer checks the global norm and names the parameter
        check_for_nan_in_grad=False,
    )


def _gpu_spec(hf_config: HFConfig) -> Any:
    """Transformer Engine layers. Not run by the CPU test suite."""
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=hf_config.qk_norm)


def _cpu_spec(hf_config: HFConfig, config: TransformerConfig) -> Any:
    layer = get_gpt_layer_local_spec(qk_layernorm=hf_config.qk_norm, normalization="RMSNorm")
    parts: Any = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = RMSNorm
    parts.mlp = GatedMLP
    attention = parts.self_attention.submodules
    if hf_config.qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    rotary = Rotary(hf_config.head_dim, hf_config.rope_theta)
    attention.core_attention = partial(PackedAttention, rotary=rotary)
    # Megatron builds the norm from its class, though the field is declared as a module
    norm: Any = RMSNorm
    return TransformerBlockSubmodules(layer_specs=[layer] * get_num_layers_to_build(config), layer_norm=norm)
