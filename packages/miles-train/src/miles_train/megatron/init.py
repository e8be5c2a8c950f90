"""Start and stop Megatron's process groups: gloo and one thread on a CPU, NCCL on GPUs."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from miles_api import generators
from miles_api.errors import ConfigError
from miles_train.parallel import Group, Parallel

from .core import parallel_state, tensor_parallel
from .cpu import has_gpu

if TYPE_CHECKING:
    from miles_train.options import ParallelOptions

__all__ = [
    "data_parallel_rank",
    "data_parallel_size",
    "device",
    "from_last_stage",
    "initialize",
    "is_first_rank",
    "is_last_stage",
    "is_reporting_rank",
    "parallel",
    "shutdown",
]


def initialize(
    parallel: ParallelOptions,
    *,
    rank: int,
    world_size: int,
    master_addr: str,
    master_port: int,
    local_rank: int = 0,
    seed: int,
    timeout: float = 1800.0,
    listen_fd: int | None = None,
) -> None:
    """Join the trainer's process groups; called once per rank, before any other function of this package.

    `local_rank` picks the GPU of this rank and is ignored on a CPU. `timeout` is in seconds and bounds every
    collective. `listen_fd` is the descriptor of a socket that listens at `master_addr` and `master_port`, on rank 0:
    with it nobody can take the port first, and the store listens at no other address. Raises ConfigError when
    `world_size` cannot hold the model-parallel sizes, or for context parallelism.
    """
    _check(parallel, world_size)
    backend = "nccl" if has_gpu() else "gloo"
    if has_gpu():
        # tensor-parallel overlap relies on kernels starting in the order they were queued
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
        torch.cuda.set_device(local_rank)
    else:
        # more threads on busy cores make the same work up to 8 times slower
        torch.set_num_threads(1)
    store = dist.TCPStore(
        master_addr,
        master_port,
        world_size,
        is_master=rank == 0,
        timeout=timedelta(seconds=timeout),
        wait_for_workers=False,
        master_listen_fd=listen_fd,
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout))
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        distributed_timeout_minutes=max(1, round(timeout / 60)),
        create_gloo_process_groups=has_gpu() and parallel.use_distributed_optimizer,
    )
    generators.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def _check(parallel: ParallelOptions, world_size: int) -> None:
    model = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    if world_size % model:
        raise ConfigError(
            f"{world_size} trainer ranks cannot be divided into models of {model} ranks "
            f"(--tensor-model-parallel-size {parallel.tensor_model_parallel_size} × "
            f"--pipeline-model-parallel-size {parallel.pipeline_model_parallel_size} × "
            f"--context-parallel-size {parallel.context_parallel_size})"
        )
    if parallel.context_parallel_size > 1:
        raise ConfigError("--context-parallel-size above 1 is not supported by this trainer yet")


def shutdown() -> None:
    """Leave the process groups; safe to call when they were never joined."""
    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def device() -> torch.device:
    """Return the device that holds this rank's parameters and that micro-batches must be moved to."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else torch.device("cpu")


def data_parallel_rank() -> int:
    """Return which data-parallel replica this rank belongs to."""
    return parallel_state.get_data_parallel_rank()


def data_parallel_size() -> int:
    """Return how many data-parallel replicas there are."""
    return parallel_state.get_data_parallel_world_size()


def is_first_rank() -> bool:
    """Say whether this is rank 0 of the whole trainer, the one that writes shared files."""
    return dist.get_rank() == 0


def is_last_stage() -> bool:
    """Say whether this rank holds the last pipeline stage, the only one that sees logits."""
    return parallel_state.is_pipeline_last_stage()


def is_reporting_rank() -> bool:
    """Say whether this rank's numbers count: one rank of each data-parallel replica, where the loss is."""
    return is_last_stage() and parallel_state.get_tensor_model_parallel_rank() == 0


def from_last_stage(flags: list[bool]) -> list[bool]:
    """Return the last pipeline stage's `flags` on every stage; a collective of each pipeline."""
    if parallel_state.get_pipeline_model_parallel_world_size() == 1:
        return flags
    packed = torch.tensor(flags, dtype=torch.uint8, device=device())
    last = parallel_state.get_pipeline_model_parallel_last_rank()
    dist.broadcast(packed, src=last, group=parallel_state.get_pipeline_model_parallel_group())
    return packed.bool().tolist()


def parallel() -> Parallel:
    """Return this rank's place, as hooks see it."""
    groups = {
        "tp": parallel_state.get_tensor_model_parallel_group(),
        "pp": parallel_state.get_pipeline_model_parallel_group(),
        "cp": parallel_state.get_context_parallel_group(),
        "dp": parallel_state.get_data_parallel_group(),
    }
    return Parallel(
        **{n: Group(dist.get_world_size(group), dist.get_rank(group), group) for n, group in groups.items()}
    )
