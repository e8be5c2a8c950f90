"""What the training side can know to be wrong before anything starts: the entry point `miles.checks: train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import problem_of
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.megatron.hf_config import check_sizes, read_hf_config
from miles_train.options import LoggingOptions, ObjectiveOptions, ParallelOptions
from miles_train.train_hooks import TRAIN_HOOKS, check_train_hooks, idle_train_hooks
from miles_train.view.sinks import check_sinks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "idle", "notes"]

HOOKS = frozenset(TRAIN_HOOKS)
"""The hooks that this package calls."""

idle = idle_train_hooks

_ASKED_FOR = ("advantage", "importance_weights", "pg_loss_reducer")
"""Hooks that belong to one loss or switch: a run that has them and not it is a mistake, not a choice."""


def notes(config: RunConfig) -> list[str]:
    """Return which options change what is computed, not only how fast."""
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    if run.debug_rollout_only:
        return ["debug_rollout_only: nothing is trained, and no checkpoint is written"]
    if run.loss_type == "sft_loss":
        return []
    found = []
    if objective.use_rollout_logprobs:
        found.append("use_rollout_logprobs: the engine's log-probs are the old ones; no pass recomputes them")
    if objective.skip_zero_advantage:
        found.append("skip_zero_advantage: samples without advantage are left out of the forward pass")
    return found


def check(config: RunConfig) -> Iterator[str]:
    """Yield what this package finds wrong: model directory, sizes, objective, sinks, directories."""
    run, parallel = config.group(RunOptions), config.group(ParallelOptions)
    yield from _parallel(parallel)
    if run.hf_checkpoint is None:
        yield "--hf-checkpoint is not set: name a Hugging Face model directory"
    else:
        yield from problem_of(
            lambda: check_sizes(read_hf_config(str(run.hf_checkpoint)), parallel, str(run.hf_checkpoint))
        )
        if not any(Path(run.hf_checkpoint).glob("*.safetensors")):
            yield f"--hf-checkpoint {run.hf_checkpoint} holds no weights (*.safetensors)"
    if run.global_batch_size is not None and run.global_batch_size < parallel.data_parallel_size:
        yield f"--global-batch-size {run.global_batch_size} is less than the {parallel.data_parallel_size} DP ranks"
    objective = config.group(ObjectiveOptions)
    if objective.skip_zero_advantage and objective.entropy_coef:
        yield "--skip-zero-advantage leaves samples out that --entropy-coef would train: set one of them"
    yield from check_train_hooks(config)
    yield from _misplaced(config)
    yield from problem_of(lambda: check_sinks(config.group(LoggingOptions)))
    yield from _run_dir(run)
    yield from _checkpoints(run)


def _misplaced(config: RunConfig) -> Iterator[str]:
    if config.group(RunOptions).debug_rollout_only:
        return
    reasons, configured = idle(config), configured_hooks(config.args)
    for name in [name for name in _ASKED_FOR if name in configured and name in reasons]:
        yield f"{REGISTRY[name].flag} {', '.join(configured[name])} would never be called: {reasons[name]}"


def _parallel(parallel: ParallelOptions) -> Iterator[str]:
    product = (
        parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size * parallel.context_parallel_size
    )
    if parallel.world_size % product:
        yield (
            f"TP {parallel.tensor_model_parallel_size} × PP {parallel.pipeline_model_parallel_size} × CP "
            f"{parallel.context_parallel_size} = {product} does not divide the {parallel.world_size} trainer ranks "
            "(--actor-num-nodes × --actor-num-gpus-per-node)"
        )
    if parallel.context_parallel_size > 1:
        yield f"--context-parallel-size {parallel.context_parallel_size}: this version trains with 1"


def _checkpoints(run: RunOptions) -> Iterator[str]:
    """Check what is loaded, and that saving replaces neither another run's checkpoints nor the source model."""
    if run.load:
        yield from problem_of(lambda: checkpoint.find(Path(str(run.load))))
    save = checkpoint.folder_of(run)
    own = run.overwrite and save.resolve().is_relative_to(Path(run.run_dir).resolve())
    continued = run.load is not None and Path(run.load).resolve() == save.resolve()
    if (save / checkpoint.LATEST).exists() and not own and not continued:
        yield f"--save {save} holds another run's checkpoints: choose another, or continue them with --load"
    if run.save_hf and run.hf_checkpoint and Path(run.save_hf).resolve() == Path(run.hf_checkpoint).resolve():
        yield f"--save-hf {run.save_hf} is --hf-checkpoint itself: choose another directory"


def _run_dir(run: RunOptions) -> Iterator[str]:
    """Protect what lies in the run directory: only an earlier run may be replaced, and not the one continued from."""
    folder = Path(run.run_dir)
    if any(parent.exists() and not parent.is_dir() for parent in (folder, *folder.parents)):
        yield f"--run-dir {run.run_dir} cannot be created: a part of its path is a file"
        return
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not run.overwrite:
        yield f"--run-dir {run.run_dir} holds an earlier run: choose another, or pass --overwrite"
    elif not (folder / "summary.json").is_file():
        yield f"--run-dir {run.run_dir} is not empty and not a run directory: --overwrite does not delete it"
    for flag, path in (("--load", run.load), ("--hf-checkpoint", run.hf_checkpoint)):
        if run.overwrite and path and Path(path).resolve().is_relative_to(folder.resolve()):
            yield f"{flag} {path} lies in --run-dir {run.run_dir}, which would be overwritten: choose another --run-dir"
