"""What follows from other options: the fourth batch knob, and the rollout function of runs that generate nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.config import DERIVED
from miles_api.errors import ConfigError
from miles_api.options import flag_of
from miles_api.run_options import RunOptions

if TYPE_CHECKING:
    from miles_api.config import RunConfig

__all__ = ["derive_batch", "derive_rollout"]

_KNOBS = ("rollout_batch_size", "n_samples_per_prompt", "global_batch_size", "num_steps_per_rollout")


def derive_batch(config: RunConfig) -> RunConfig:
    """Fill in the fourth of the batch knobs.

    rollout_batch_size × n_samples_per_prompt = global_batch_size × num_steps_per_rollout. Raises `ConfigError` when
    two or more are missing (num_steps_per_rollout counts as 1, n_samples_per_prompt as 1) or the four disagree.
    """
    return config.replace(DERIVED, **_batch_knobs(config.group(RunOptions)))


def derive_rollout(config: RunConfig) -> RunConfig:
    """Name the rollout function of a run that samples nothing: supervised data, or rollouts that were recorded."""
    run = config.group(RunOptions)
    if config.flat()["rollout_function_path"]:
        return config
    if run.load_debug_rollout_data is not None:
        return config.replace(DERIVED, rollout_function_path="recorded")
    if run.loss_type == "sft_loss":
        return config.replace(DERIVED, rollout_function_path="sft")
    return config


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
