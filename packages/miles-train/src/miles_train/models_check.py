"""Which models a run needs beside the policy, and what can be known wrong with their directories.

Imports no torch: `miles check` asks for it before anything starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import MilesError, counted
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_train.estimators import ESTIMATORS
from miles_train.megatron.hf_config import check_sizes, read_hf_config
from miles_train.needs import needs_ref, needs_teacher
from miles_train.options import ModelsOptions, ObjectiveOptions, OptimizerOptions, ParallelOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = [
    "check_models",
    "critic_options",
    "has_critic",
    "has_reference",
    "has_teacher",
    "model_directories",
    "models_notes",
]

_MAY_ASK_A_TEACHER = frozenset(
    {
        "rollout",
        "generate",
        "agent",
        "reward",
        "group_reward",
        "reward_post_process",
        "sample_filter",
        "convert_samples",
    }
)
"""Hooks that may set `teacher_log_probs`."""


def has_critic(config: RunConfig) -> bool:
    """Say whether the run trains a critic."""
    estimator = ESTIMATORS[config.group(ObjectiveOptions).advantage_estimator]
    return estimator.needs_values and config.group(RunOptions).loss_type != "sft_loss"


def has_reference(config: RunConfig) -> bool:
    """Say whether the run has a reference model, and so a pass for `ref_log_probs` in every rollout."""
    return needs_ref(config.group(ObjectiveOptions)) and config.group(RunOptions).loss_type != "sft_loss"


def has_teacher(config: RunConfig) -> bool:
    """Say whether the trainer has a teacher, and so a pass for `teacher_log_probs`; else the rollout brings them."""
    named = config.group(ModelsOptions).opd_teacher_load is not None
    return named and needs_teacher(config.group(ObjectiveOptions)) and config.group(RunOptions).loss_type != "sft_loss"


def model_directories(config: RunConfig) -> dict[str, tuple[str, str]]:
    """Return the flag and the directory of each model that the run needs, by role, the policy first."""
    own, models = config.group(RunOptions).hf_checkpoint, config.group(ModelsOptions)
    places = {
        "policy": (True, "--hf-checkpoint", own),
        "critic": (has_critic(config), "--critic-load", models.critic_load),
        "reference": (has_reference(config), "--ref-load", models.ref_load),
        "teacher": (has_teacher(config), "--opd-teacher-load", models.opd_teacher_load),
    }
    named = {role: (flag, path) for role, (needed, flag, path) in places.items() if needed}
    return {
        role: (flag, str(path)) if path is not None else ("--hf-checkpoint", str(own))
        for role, (flag, path) in named.items()
    }


def critic_options(config: RunConfig) -> OptimizerOptions:
    """Return the optimizer's options with the critic's learning rate and warm-up."""
    options, models = config.group(OptimizerOptions), config.group(ModelsOptions)
    rate = options.lr if models.critic_lr is None else models.critic_lr
    return msgspec.structs.replace(options, lr=rate, lr_warmup_iters=models.critic_lr_warmup_iters)


def models_notes(config: RunConfig) -> Iterator[str]:
    """Yield where the models beside the policy come from, and which rollouts do not train the policy."""
    if config.group(RunOptions).hf_checkpoint is not None:
        others = [f"{role} {path}" for role, (_, path) in model_directories(config).items() if role != "policy"]
        if others:
            yield f"models beside the policy: {', '.join(others)}"
    alone = config.group(ModelsOptions).num_critic_only_steps
    if config.group(RunOptions).loss_type == "value_loss":
        yield "loss_type: value_loss trains the critic alone, the policy stays as it is"
    elif has_critic(config) and alone:
        yield f"num_critic_only_steps: the critic trains alone in the first {counted(alone, 'rollout')}"


def check_models(config: RunConfig) -> Iterator[str]:
    """Yield what is wrong with the directories of reference, teacher and critic, each with its flag."""
    yield from _teacher(config)
    if config.group(RunOptions).hf_checkpoint is None:
        return
    directories = model_directories(config)
    for flag, directory in dict.fromkeys(directories.values()):
        if flag != "--hf-checkpoint":
            yield from _check_directory(config, flag, directory)


def _teacher(config: RunConfig) -> Iterator[str]:
    if not needs_teacher(config.group(ObjectiveOptions)) or has_teacher(config):
        return
    recorded = config.group(RunOptions).load_debug_rollout_data is not None
    if not recorded and _MAY_ASK_A_TEACHER.isdisjoint(configured_hooks(config.args)):
        yield (
            "--use-opd needs a teacher's log-probs, and nothing here brings them: name its directory with "
            "--opd-teacher-load, or a hook that sets `teacher_log_probs` of samples, such as "
            "--custom-generate-function-path or --custom-reward-post-process-path"
        )


def _check_directory(config: RunConfig, flag: str, directory: str) -> Iterator[str]:
    policy = str(config.group(RunOptions).hf_checkpoint)
    try:
        found = read_hf_config(directory)
        check_sizes(found, config.group(ParallelOptions), directory)
    except MilesError as error:
        yield f"{flag}: {error}"
        return
    if not any(Path(directory).glob("*.safetensors")):
        yield f"{flag} {directory} holds no weights (*.safetensors)"
    try:
        wanted = read_hf_config(policy).vocab_size
    except MilesError:
        return  # reported of --hf-checkpoint
    if found.vocab_size != wanted:
        yield (
            f"{flag} {directory} has a vocabulary of {found.vocab_size} tokens and --hf-checkpoint {policy} one of "
            f"{wanted}: its numbers would be of other tokens. Name a model of the same tokenizer"
        )
