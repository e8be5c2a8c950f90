"""Training checkpoints in Megatron's torch_dist format: weights, optimizer and schedule, loadable on other layouts.

The random states of the ranks lie beside them (`rng`): these belong to one layout.
"""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.distributed.checkpoint.api import CheckpointException

from miles_api.errors import DataError

from . import rng
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
_UNREADABLE = (pickle.UnpicklingError, EOFError, RuntimeError, ValueError)
"""What reading a file raises whose content is not what was written."""
_FAILURES = (dist_checkpointing.core.CheckpointingException, CheckpointException)


_Critic = tuple[list[DistributedDataParallel], "Optimizer"]
_SHARDED = "use_distributed_optimizer"
"""What a checkpoint says of its optimizer, whose state another kind of optimizer cannot read."""
_CRITIC = "critic"
"""The part of a checkpoint that has the critic, as one of its own: both models' weights have the same names."""


def save(
    model: list[DistributedDataParallel], optimizer: Optimizer, directory: str, *, critic: _Critic | None = None
) -> None:
    """Write a checkpoint into `directory`, which is created and must be empty; `critic` is the second model to save.

    A collective: every rank calls it with the same directory on a shared file system, and every rank returns after its
    own files are complete. A caller that needs all or nothing saves into a staging directory and renames it. Raises
    DataError naming the directory when it cannot be written.
    """
    try:
        _save(model, optimizer, Path(directory))
        if critic is not None:
            _save(*critic, Path(directory, _CRITIC))
        rng.save(directory)
    # torch's own writer turns a full disk into a RuntimeError
    except (OSError, RuntimeError, *_FAILURES) as error:
        raise DataError(f"{directory} cannot be written: {_words(_reason(error))}") from error


def load(
    model: list[DistributedDataParallel],
    optimizer: Optimizer,
    directory: str,
    *,
    critic: _Critic | None = None,
    with_optimizer: bool = True,
    with_rng: bool = True,
) -> None:
    """Load what `save` wrote into models and optimizers built from the same HF directories and options.

    A critic that was saved and is not asked for stays unread. Without `with_optimizer` optimizers and their schedules
    stay as they were built, on the loaded weights; without `with_rng` so do the random states. The parallel sizes may
    differ from the saved ones, but not if the random states are loaded. Raises DataError when the directory holds no
    checkpoint, one of another model, of another kind of optimizer or without the critic, or random states of other
    ranks.
    """
    if critic is not None and Path(directory).is_dir() and not Path(directory, _CRITIC).is_dir():
        raise DataError(
            f"{directory} holds no critic: a run without one saved it. To train a critic from here, begin with the "
            "checkpoint's Hugging Face directory as --hf-checkpoint"
        )
    _load(model, optimizer, directory, with_optimizer=with_optimizer)
    if critic is not None:
        _load(*critic, str(Path(directory, _CRITIC)), with_optimizer=with_optimizer)
    if with_rng:
        rng.load(directory)


def _save(model: list[DistributedDataParallel], optimizer: Optimizer, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    state = _state(model, optimizer, is_loading=False)
    dist_checkpointing.save(state, str(directory), content_metadata=_METADATA | {_SHARDED: optimizer.is_sharded})


def _load(model: list[DistributedDataParallel], optimizer: Optimizer, directory: str, *, with_optimizer: bool) -> None:
    try:
        if not dist_checkpointing.check_is_distributed_checkpoint(directory):
            raise DataError(f"{directory} holds no training checkpoint")
        if with_optimizer:
            _check_kind(optimizer, directory)
        # it returns a tuple only under a `strict` that asks for the keys that do not match
        wanted = _state(model, optimizer if with_optimizer else None, is_loading=True)
        with warnings.catch_warnings():
            # Megatron loads through what torch has deprecated
            warnings.simplefilter("ignore", FutureWarning)
            state = cast("dict[str, Any]", dist_checkpointing.load(wanted, directory))
    except (*_FAILURES, *_UNREADABLE) as error:
        raise DataError(f"{directory} is damaged or does not fit this model: {_reason(error)}") from error
    unwrap(model).load_state_dict(_plain(state["model"]))
    if with_optimizer:
        optimizer.load_sharded_state(state["optimizer"])
    else:
        # fp32 masters and shards were copied from the weights before these were loaded
        optimizer.inner.reload_model_params()


def _check_kind(optimizer: Optimizer, directory: str) -> None:
    is_sharded = (dist_checkpointing.load_content_metadata(directory) or {}).get(_SHARDED, optimizer.is_sharded)
    if is_sharded != optimizer.is_sharded:
        saved, way_out = ("with", "pass it again") if is_sharded else ("without", "leave it out")
        raise DataError(
            f"{directory} was saved {saved} --use-distributed-optimizer, which keeps another optimizer state: "
            f"{way_out}, or begin with a fresh optimizer by --no-load-optim"
        )


def _state(model: list[DistributedDataParallel], optimizer: Optimizer | None, *, is_loading: bool) -> dict[str, Any]:
    # a copy each: Megatron writes the process group of the moment into it
    weights = unwrap(model).sharded_state_dict(metadata=dict(_METADATA))
    state = {"model": weights}
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state(weights, dict(_METADATA), is_loading=is_loading)
    return state


def _reason(error: BaseException) -> str:
    """Return the line that names the tensor or the file; before it come every rank's tracebacks."""
    if "weights_only" in str(error):
        return "a file does not hold what was written"  # torch would have it read without safeguards
    return str(error).strip().splitlines()[-1][:_LONGEST_REASON] if str(error).strip() else type(error).__name__


def _words(reason: str) -> str:
    """Translate what torch says of a file that could not be written."""
    if "unexpected pos" in reason or "iostream error" in reason:
        return "a file was not taken whole (full disk, quota or limit of file size)"
    if reason.endswith("dict_keys([])"):
        return "another rank could not write its part"
    return reason.rpartition("Worker failure: ")[2]


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    # Transformer Engine's layers save states that are no tensors and may be empty
    return {name: value for name, value in state.items() if value is not None}
