"""Training checkpoints in Megatron's torch_dist format: weights, optimizer and schedule, loadable on other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint.api import CheckpointException

from miles_api.errors import DataError

from .core import DistributedDataParallel, dist_checkpointing, unwrap

if TYPE_CHECKING:
    from .optimizer import Optimizer

__all__ = ["load", "save"]

_METADATA = {
    # the one layout of a sharded optimizer that other parallel sizes can load
    "distrib_optim_sharding_type": "fully_reshardable",
    # gathers it over the main process group; gloo groups beside NCCL would only save GPU memory
    "distrib_optim_fully_reshardable_mem_efficient": False,
}

_LONGEST_REASON = 300


def save(model: list[DistributedDataParallel], optimizer: Optimizer, directory: str) -> None:
    """Write a checkpoint into `directory`, which is created and must be empty.

    A collective: every rank calls it with the same directory on a shared file system, and every rank returns after its
    own files are complete. A caller that needs all or nothing saves into a staging directory and renames it.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(_state(model, optimizer, is_loading=False), directory, content_metadata=dict(_METADATA))


def load(model: list[DistributedDataParallel], optimizer: Optimizer, directory: str) -> None:
    """Load what `save` wrote into a model and an optimizer built from the same HF directory and options.

    The parallel sizes may differ from the saved ones. Raises DataError when the directory holds no checkpoint or one
    of another model.
    """
    if not dist_checkpointing.check_is_distributed_checkpoint(directory):
        raise DataError(f"{directory} holds no training checkpoint")
    try:
        # it returns a tuple only under a `strict` that asks for the keys that do not match
        state = cast("dict[str, Any]", dist_checkpointing.load(_state(model, optimizer, is_loading=True), directory))
    except (dist_checkpointing.core.CheckpointingException, CheckpointException) as error:
        # the last line names the tensor; before it come every rank's tracebacks
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"{directory} does not fit this model: {reason[:_LONGEST_REASON]}") from error
    unwrap(model).load_state_dict(_plain(state["model"]))
    optimizer.load_sharded_state(state["optimizer"])


def _state(model: list[DistributedDataParallel], optimizer: Optimizer, *, is_loading: bool) -> dict[str, Any]:
    # a copy each: Megatron writes the process group of the moment into it
    weights = unwrap(model).sharded_state_dict(metadata=dict(_METADATA))
    return {
        "model": weights,
        "optimizer": optimizer.sharded_state(weights, dict(_METADATA), is_loading=is_loading),
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    # Transformer Engine's layers save states that are no tensors and may be empty
    return {name: value for name, value in state.items() if value is not None}
