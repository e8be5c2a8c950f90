"""What can be known to be wrong before anything starts: every installed package's checks, in one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.config import DERIVED
from miles_api.errors import ConfigError, problem_of
from miles_api.hooks import REGISTRY
from miles_api.hookset import configured_hooks
from miles_api.load import entry_points, provider
from miles_api.options import flag_of
from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.megatron.hf_config import check_sizes, read_hf_config
from miles_train.options import LoggingOptions, ObjectiveOptions, ParallelOptions
from miles_train.view.sinks import check_sinks

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "check_all", "derive", "idle", "idle_hooks"]

HOOKS: frozenset[str] = frozenset()
"""The hooks that this package calls."""

_KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def derive(config: RunConfig) -> RunConfig:
    """Fill in the fourth of the batch knobs and the defaults that follow from others.

    rollout_batch_size × n_samples_per_prompt = global_batch_size × num_steps_per_rollout. Raises `ConfigError` when
    two or more are missing (num_steps_per_rollout counts as 1, n_samples_per_prompt as 1) or the four disagree.
    """
    run = config.group(RunOptions)
    changes: dict[str, Any] = _batch_knobs(run)
    if run.loss_type == "sft_loss" and not config.flat()["rollout_function_path"]:
        changes["rollout_function_path"] = "sft"
    return config.replace(DERIVED, **changes)


def _batch_knobs(run: RunOptions) -> dict[str, int]:
    given = {knob: getattr(run, knob) for knob in _KNOBS}
    missing = [knob for knob, value in given.items() if value is None]
    for knob in ("num_steps_per_rollout", "n_samples_per_prompt"):
        if len(missing) > 1 and knob in missing:
            given[knob] = 1
            missing.remove(knob)
    if len(missing) > 1:
        raise ConfigError(f"batch size: set {flag_of(missing[0])} or {flag_of(missing[1])}")
    if missing:
        given[missing[0]] = _fourth(missing[0], given)
    prompts, group, step, steps = (given[knob] for knob in _KNOBS)
    if prompts * group != step * steps:
        raise ConfigError(
            f"batch sizes disagree: --rollout-batch-size {prompts} × --n-samples-per-prompt {group} = "
            f"{prompts * group}, but --global-batch-size {step} × --num-steps-per-rollout {steps} = {step * steps}"
        )
    return {knob: value for knob, value in given.items() if getattr(run, knob) is None}


def _fourth(knob: str, given: dict[str, Any]) -> int:
    here, there = (_KNOBS[:2], _KNOBS[2:]) if knob in _KNOBS[:2] else (_KNOBS[2:], _KNOBS[:2])
    other = next(name for name in here if name != knob)
    product = given[there[0]] * given[there[1]]
    if product % given[other]:
        raise ConfigError(
            f"{flag_of(knob)} cannot be derived: {there[0]} {given[there[0]]} × {there[1]} "
            f"{given[there[1]]} = {product} is not a multiple of {other} {given[other]}"
        )
    return product // given[other]


def idle(_config: RunConfig) -> dict[str, str]:
    """Return the hooks of this package that a run does not call, by name, with the reason."""
    return {}


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
    if (run.global_batch_size or 0) < parallel.data_parallel_size:
        yield f"--global-batch-size {run.global_batch_size} is less than the {parallel.data_parallel_size} DP ranks"
    objective = config.group(ObjectiveOptions)
    if objective.skip_zero_advantage and objective.entropy_coef:
        yield "--skip-zero-advantage leaves samples out that --entropy-coef would train: set one of them"
    if run.loss_type not in ("policy_loss", "sft_loss"):
        yield f"--loss-type {run.loss_type} is not trained by this version; choose policy_loss or sft_loss"
    yield from problem_of(lambda: check_sinks(config.group(LoggingOptions)))
    yield from _run_dir(run)
    yield from _checkpoints(run)


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
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not run.overwrite:
        yield f"--run-dir {run.run_dir} holds an earlier run: choose another, or pass --overwrite"
    elif not (folder / "summary.json").is_file():
        yield f"--run-dir {run.run_dir} is not empty and not a run directory: --overwrite does not delete it"
    for flag, path in (("--load", run.load), ("--hf-checkpoint", run.hf_checkpoint)):
        if run.overwrite and path and Path(path).resolve().is_relative_to(folder.resolve()):
            yield f"{flag} {path} lies in --run-dir {run.run_dir}, which would be overwritten: choose another --run-dir"


def _checks() -> list[Any]:
    """Return every package's check module: `HOOKS`, the hooks it can call, `idle` and `check`."""
    return [provider("miles.checks", name) for name in sorted(entry_points("miles.checks"))]


def idle_hooks(config: RunConfig) -> dict[str, str]:
    """Return the hooks that this very run does not call by itself, with the reason."""
    return {hook: reason for module in _checks() for hook, reason in module.idle(config).items()}


def check_all(config: RunConfig) -> None:
    """Run the checks of every installed package; `ConfigError` lists all problems."""
    checks = _checks()
    called = frozenset().union(*(module.HOOKS for module in checks))
    problems = [problem for module in checks for problem in module.check(config)]
    problems += [
        f"{REGISTRY[name].flag} is set, but nothing installed calls the {name} hook: it would never run"
        for name in configured_hooks(config.args)
        if name not in called
    ]
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
