"""What the training side can know to be wrong before anything starts: the entry point `miles.checks: train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import MilesError, problem_of
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import configured_hooks
from miles_api.options import flag_of, option_kind
from miles_api.run_options import RunOptions
from miles_train.batching import check_batching
from miles_train.driver import checkpoint
from miles_train.driver.identity import changes, mismatches
from miles_train.driver.layout import derived_engines, layout_notes, layout_problems
from miles_train.driver.start import LOCK, SUMMARY, saves_where_it_loads, start_of
from miles_train.megatron.hf_config import check_sizes, read_hf_config
from miles_train.models_check import check_models, models_notes
from miles_train.objective_check import derived_rewards, objective_notes
from miles_train.options import LoggingOptions, ObjectiveOptions, ParallelOptions
from miles_train.train_hooks import TRAIN_HOOKS, check_train_hooks, idle_train_hooks
from miles_train.view.sinks import check_sinks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "derived", "idle", "notes"]

HOOKS = frozenset(TRAIN_HOOKS)
"""The hooks that this package calls."""

idle = idle_train_hooks


def derived(config: RunConfig) -> dict[str, bool | int]:
    """Return what follows from the estimator for rewards, and from GPUs for engines."""
    return derived_rewards(config) | derived_engines(config)


_LEFT_BEHIND = (
    ("load_optim", False, "--no-load-optim", "with a fresh optimizer and schedule"),
    ("load_rng", False, "--no-load-rng", "with fresh random states"),
    ("reset_data_source", True, "--reset-data-source", "with the first prompt"),
)
"""Options, the value with which they leave a part of a checkpoint behind, its flag, and what that means."""
_ASKED_FOR = ("advantage", "importance_weights", "pg_loss_reducer")
"""Hooks that belong to one loss or switch: a run that has them and not it is a mistake, not a choice."""


def notes(config: RunConfig) -> list[str]:
    """Return which options change what is computed, not only how fast."""
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    if run.debug_rollout_only:
        return ["debug_rollout_only: nothing is trained, and no checkpoint is written"]
    found = [*_origin(config), *layout_notes(config)]
    if run.loss_type == "sft_loss":
        return found
    found += [*models_notes(config), *objective_notes(config)]
    if objective.use_rollout_logprobs:
        found.append("use_rollout_logprobs: the engine's log-probs are the old ones; no pass recomputes them")
    if objective.skip_zero_advantage:
        found.append("skip_zero_advantage: samples without advantage are left out of the forward pass")
    return found


def _origin(config: RunConfig) -> list[str]:
    """Say where the run begins, and what it does not take or not find there as it was."""
    run = config.group(RunOptions)
    try:
        start = start_of(run)
    except MilesError:
        return []  # one of the problems
    if start is None:
        return ["resume: there is no checkpoint yet, the run begins anew"] if run.resume else []
    rollout_id = start.state.rollout_id
    where = f"{'resumed' if start.own else 'continued'} after rollout {rollout_id}, from {start.folder}"
    left = [text for option, value, _, text in _LEFT_BEHIND if getattr(run, option) is value]
    done = ["all its rollouts are done"] if rollout_id + 1 >= run.num_rollout else []
    return ["; ".join([where, *left, *done]), *start.remarks, *changes(start.state, config)]


def check(config: RunConfig) -> Iterator[str]:
    """Yield what this package finds wrong: model directory, sizes, objective, sinks, directories."""
    run, parallel = config.group(RunOptions), config.group(ParallelOptions)
    yield from _parallel(parallel)
    yield from layout_problems(config)
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
    yield from check_batching(config)
    yield from check_models(config)
    yield from check_train_hooks(config)
    yield from _misplaced(config)
    yield from problem_of(lambda: check_sinks(config.group(LoggingOptions)))
    yield from _run_dir(run)
    if run.overwrite:
        yield from _would_be_deleted(config)
    yield from _checkpoints(run)
    yield from _loaded(config)


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
    """Check that saving replaces neither another run's checkpoints nor the source model."""
    save = checkpoint.folder_of(run)
    # What a run directory may be used for again is said of it as a whole.
    own = save.resolve().is_relative_to(Path(run.run_dir).resolve())
    continued = run.resume or saves_where_it_loads(run)
    if checkpoint.holds_checkpoints(save) and not own and not continued:
        yield f"--save {save} holds another run's checkpoints: choose another, or continue them with --load"
    if run.save_hf and run.hf_checkpoint and Path(run.save_hf).resolve() == Path(run.hf_checkpoint).resolve():
        yield f"--save-hf {run.save_hf} is --hf-checkpoint itself: choose another directory"


def _loaded(config: RunConfig) -> Iterator[str]:
    """Check that what the run continues from is whole and fits it."""
    run = config.group(RunOptions)
    if run.resume and run.overwrite:
        yield "--resume continues the run in --run-dir, and --overwrite deletes it: drop one"
        return
    if run.resume and run.debug_rollout_only:
        yield "--debug-rollout-only writes no checkpoint that --resume could continue from: drop one"
        return
    try:
        start = start_of(run)
        if start is not None:
            yield from mismatches(start.state, config, start.folder)
    except MilesError as error:
        yield str(error)
        return
    if start is None:
        yield from (
            f"{flag} says what to take of a checkpoint, and the run continues none: pass --load or --resume"
            for option, value, flag, _ in _LEFT_BEHIND
            if not run.resume and getattr(run, option) is value
        )
    elif not start.own:
        yield from _another_run(run, start.state.rollout_id)


def _another_run(run: RunOptions, rollout_id: int) -> Iterator[str]:
    """Check that there is work after a rollout of another run, and that doing it replaces nothing of that run."""
    if rollout_id + 1 >= run.num_rollout:
        yield (
            f"--load {run.load} holds the state after rollout {rollout_id}: with --num-rollout "
            f"{run.num_rollout} nothing is left to train"
        )
    save = checkpoint.folder_of(run)
    later = ", ".join(checkpoint.names_after(save, rollout_id)) if saves_where_it_loads(run) else ""
    if later:
        yield f"--save {save} holds {later}, later than what --load {run.load} continues: choose another --save"


def _run_dir(run: RunOptions) -> Iterator[str]:
    """Protect what lies in the run directory: only an earlier run may be replaced, and not the one continued from."""
    folder = Path(run.run_dir)
    if any(parent.exists() and not parent.is_dir() for parent in (folder, *folder.parents)):
        yield f"--run-dir {run.run_dir} cannot be created: a part of its path is a file"
        return
    if not folder.is_dir() or not any(path.name != LOCK for path in folder.iterdir()):
        return
    if not run.overwrite and not run.resume:
        yield f"--run-dir {run.run_dir} holds an earlier run: pass --resume to continue it, --overwrite, or another"
    elif not (folder / SUMMARY).is_file():
        flag = "--overwrite does not delete it" if run.overwrite else "there is nothing to --resume"
        yield f"--run-dir {run.run_dir} is not empty and not a run directory: {flag}"


def _would_be_deleted(config: RunConfig) -> Iterator[str]:
    """Protect what the run reads: models, checkpoints, prompts, records and files with hooks."""
    run = config.group(RunOptions)
    folder = Path(run.run_dir).resolve()
    inputs = [
        (flag_of(field.name), getattr(group, field.name))
        for group in config.groups.values()
        for field in msgspec.structs.fields(group)
        if option_kind(field.type).path == "input"
    ]
    inputs += [
        (str(REGISTRY[name].flag), reference)
        for name, references in configured_hooks(config.args).items()
        for reference in references
        if ".py:" in reference
    ]
    inputs += [
        (flag_of(field.name), reference)
        for group in config.groups.values()
        for field in msgspec.structs.fields(group)
        if option_kind(field.type).path == "references"
        for reference in getattr(group, field.name)
        if ".py:" in reference
    ]
    for flag, given in inputs:
        path = given and Path(given.rpartition(":")[0] if ".py:" in given else given)
        if path and path.resolve().is_relative_to(folder):
            where = f"lies in --run-dir {run.run_dir}, which would be overwritten"
            yield f"{flag} {given} {where}: choose another --run-dir"
