"""What the options of a run say about each other, whichever packages are installed: companions, debugging, dumps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import MilesError, counted, did_you_mean
from miles_api.loading.hookset import configured_hooks
from miles_api.options import flag_of
from miles_api.record import RecordedRollout, read_dump
from miles_api.run_options import RunOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["check_run_options", "idle_by_run_options", "services_of"]

_EVAL_HOOKS = ("eval_rollout", "eval_rollout_log")


def services_of(run: RunOptions) -> tuple[str, ...]:
    """Return the services that a run starts: without engines where rollouts are read, without a trainer for debugging.

    The names are those of the entry points under `miles.services`.
    """
    reads = run.loss_type == "sft_loss" or run.load_debug_rollout_data is not None
    return ("rollout", *(() if reads else ("engines", "router")), *(() if run.debug_rollout_only else ("train",)))


def idle_by_run_options(config: RunConfig) -> dict[str, str]:
    """Return the hooks that no run with these options calls, by name, with the reason."""
    run = config.group(RunOptions)
    if "engines" not in services_of(run):
        return dict.fromkeys(_EVAL_HOOKS, "no engine runs, so nothing is evaluated")
    if run.eval_interval is None:
        return dict.fromkeys(_EVAL_HOOKS, "--eval-interval is not set")
    return {}


def check_run_options(config: RunConfig) -> Iterator[str]:
    """Yield a problem for each option that contradicts another one or a file that is there."""
    run = config.group(RunOptions)
    # Prompts may bring their own tools; the option is another package's.
    yield from _companions(run, set(configured_hooks(config.args)), bool(config.flat().get("tool_key")))
    yield from _debugging(run, config)
    for field in ("save_debug_rollout_data", "save_debug_train_data"):
        yield from _dump_target(run, field)
    if run.save_debug_rollout_data is not None and run.save_debug_rollout_data == run.save_debug_train_data:
        yield f"--save-debug-train-data {run.save_debug_train_data} is --save-debug-rollout-data too: one file each"


def _companions(run: RunOptions, hooks: set[str], prompts_name_tools: bool) -> Iterator[str]:
    if "loss" in hooks and run.loss_type != "custom_loss":
        yield f"--custom-loss-function-path is called with --loss-type custom_loss only, not with {run.loss_type}"
    if "execute_tool" in hooks and "tool_specs" not in hooks and not prompts_name_tools:
        yield (
            "--generate-execute-tool-function-path needs --generate-tool-specs-path, or prompts with tools "
            "(--tool-key): the model has to know them"
        )
    if "tool_specs" in hooks and "execute_tool" not in hooks:
        yield "--generate-tool-specs-path needs --generate-execute-tool-function-path, which runs the tools"


def _debugging(run: RunOptions, config: RunConfig) -> Iterator[str]:
    if run.debug_rollout_only:
        if run.load_debug_rollout_data is not None:
            yield "--debug-rollout-only with --load-debug-rollout-data would neither generate nor train: drop one"
        if run.load is not None:
            yield (
                f"--debug-rollout-only generates with the weights of --hf-checkpoint and cannot --load {run.load}: "
                "name the checkpoint's hf directory as --hf-checkpoint"
            )
        if run.save_debug_train_data is not None:
            yield "--save-debug-train-data writes nothing with --debug-rollout-only: no trainer runs"
    if run.load_debug_rollout_data is not None:
        reference = config.flat()["rollout_function_path"]
        if reference != "recorded":
            yield (
                f"--load-debug-rollout-data trains on recorded rollouts, and --rollout-function-path {reference} "
                "makes new ones: drop one"
            )
        yield from _recorded(run, Path(run.load_debug_rollout_data))


def _recorded(run: RunOptions, file: Path) -> Iterator[str]:
    """Check that the dump can be read and holds every rollout of the run."""
    flag = f"--load-debug-rollout-data {file}"
    if not file.is_file():
        near = did_you_mean(file.name, [p.name for p in file.parent.iterdir()]) if file.parent.is_dir() else ""
        yield f"{flag}: there is no such file{near}"
        return
    try:
        dump = read_dump(str(file))
        if dump.header.kind != "rollout":
            yield f"{flag} holds {dump.header.kind} batches, not rollouts"
            return
        held = {one.rollout_id for one in dump if isinstance(one, RecordedRollout) and not one.evaluation}
    except MilesError as error:
        yield f"{flag}: {error}"
        return
    # A run that is continued needs only what comes after its checkpoint.
    wanted = range(run.num_rollout if run.load is None and not run.resume else 0)
    lacking = [rollout_id for rollout_id in wanted if rollout_id not in held]
    if lacking:
        damage = f"; its end is damaged: {dump.damage}" if dump.damage else ""
        yield (
            f"{flag} holds {counted(len(held), 'rollout')}, and --num-rollout is {run.num_rollout}: rollout "
            f"{lacking[0]} is missing{damage}"
        )


def _dump_target(run: RunOptions, field: str) -> Iterator[str]:
    """Protect a dump that is there: only the run that continues it may append."""
    path = getattr(run, field)
    if path is None:
        return
    file, flag = Path(path), flag_of(field)
    replaced = run.overwrite and file.resolve().is_relative_to(Path(run.run_dir).resolve())
    if file.is_dir():
        yield f"{flag} {path} is a directory: name a file"
    elif file.exists() and run.load is None and not run.resume and not replaced:
        yield f"{flag} {path} exists already: choose another file, or continue its run with --load"
    elif any(parent.exists() and not parent.is_dir() for parent in file.parents):
        yield f"{flag} {path} cannot be created: a folder of its path is a file"
