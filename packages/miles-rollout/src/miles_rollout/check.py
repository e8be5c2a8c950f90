"""What the rollout side can know to be wrong before anything starts."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.checks.run_checks import services_of
from miles_api.compat import translate
from miles_api.errors import problem_of
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_rollout.budget import ErrorBudget
from miles_rollout.engines.key import given_key
from miles_rollout.engines.local.errors import CheckpointError, UnsupportedModelError
from miles_rollout.engines.local.lean_config import LeanConfig
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.check import context_length, derived_engines, engine_notes, engine_problems
from miles_rollout.generate import derive as generation
from miles_rollout.hook_names import CALLED, CALLED_BY_LOOP
from miles_rollout.jsonl import read_prompts, takes_messages
from miles_rollout.older_weights import FLAG, PARTIAL_FLAG, takes_new_weights
from miles_rollout.options import (
    DataOptions,
    EngineFleetOptions,
    EvalOptions,
    FailureOptions,
    RewardOptions,
    RolloutOptions,
)
from miles_rollout.rewards import derive as rewards
from miles_rollout.rewards.prompts import prompt_problems
from miles_rollout.tokenizer_files import check_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig
    from miles_rollout.jsonl import Prompt

__all__ = ["HOOKS", "check", "derived", "idle", "notes", "parts"]

HOOKS = frozenset(CALLED)
parts = rewards.parts
"""The hooks that this package calls."""

_LOOP = "inference"
"""The default loop's short name: configuring it changes nothing."""


def derived(config: RunConfig) -> dict[str, Any]:
    """Return the generate and the reward hook, and the number of engines, that follow from other options."""
    return generation.derived(config) | rewards.derived(config) | derived_engines(config)


def idle(config: RunConfig) -> dict[str, str]:
    """Return the hooks of this package that a run does not call, by name, with the reason."""
    reasons = generation.idle(config)
    configured = configured_hooks(config.args)
    own_loop = configured.get("rollout", [_LOOP])
    if config.group(RunOptions).load_debug_rollout_data is not None:
        reasons |= dict.fromkeys(
            (*CALLED_BY_LOOP, "sample_filter", "eval_rollout", "eval_rollout_log", "data_source", "buffer_filter"),
            "rollouts are read from --load-debug-rollout-data",
        )
    elif config.group(RunOptions).loss_type == "sft_loss":
        reasons |= dict.fromkeys(
            (*CALLED_BY_LOOP, "eval_rollout", "eval_rollout_log"), "supervised, nothing is sampled"
        )
    elif translate(own_loop[0]) != _LOOP:
        reasons |= dict.fromkeys(CALLED_BY_LOOP, "that is up to the rollout hook")
    if "data_source" in configured:
        reasons["buffer_filter"] = "that is up to the data source"
    return reasons


def notes(config: RunConfig) -> list[str]:
    """Return what a weighted reward adds up, and what `--deterministic` cannot promise: hooks may look at the clock."""
    run, found = config.group(RunOptions), [*rewards.notes(config), *_changes_nothing(config)]
    found += engine_notes(config) if "engines" in services_of(run) else []
    if not run.deterministic or run.load_debug_rollout_data is not None:
        return found
    # Short names are those of installed packages.
    own = [name for name, given in configured_hooks(config.args).items() if any(":" in r or "." in r for r in given)]
    own += ["reward"] if rewards.own_parts(config) else []
    named = ", ".join(sorted(HOOKS.intersection(own)))
    return found + ([f"deterministic: the run repeats as far as these hooks of yours do: {named}"] if named else [])


def _changes_nothing(config: RunConfig) -> Iterator[str]:
    """Say which of the options for responses that outlast a rollout change nothing in this run."""
    run, options = config.group(RunOptions), config.group(RolloutOptions)
    own_loop = translate(configured_hooks(config.args).get("rollout", [_LOOP])[0]) != _LOOP
    engines = "engines" in services_of(run)
    if options.partial_rollout and not own_loop:
        started = options.over_sampling_batch_size or 0
        if not engines or started <= (run.rollout_batch_size or 0):
            yield (
                f"{PARTIAL_FLAG} changes nothing here: no more groups are started than a rollout needs; raise "
                "--over-sampling-batch-size"
            )
    older = own_loop or options.partial_rollout or takes_new_weights(config.args)
    if options.mask_offpolicy_in_partial_rollout and not (engines and older):
        yield f"{FLAG} changes nothing here: one rollout's responses are all of the same weights"


def check(config: RunConfig) -> Iterator[str]:
    """Yield what does not fit: error budget, prompt files, tokenizer, reward. `miles_api` checks that hooks load."""
    run = config.group(RunOptions)
    yield from problem_of(lambda: ErrorBudget(config.group(FailureOptions).hook_error_budget))
    if run.load_debug_rollout_data is not None:
        return
    kinds: set[str] = set()
    yield from _data(config, kinds)
    if run.loss_type != "sft_loss":
        yield from generation.problems(config)
        yield from rewards.problems(config, kinds)
        yield from _lengths(config)
        yield from problem_of(lambda: given_key(config.group(EngineFleetOptions)))
        yield from engine_problems(config)
        yield from _determinism(config)


def _data(config: RunConfig, kinds: set[str]) -> Iterator[str]:
    """Check the tokenizer and read the prompt files, from their files alone: transformers takes seconds to import.

    `kinds` gets the rewards that prompts name for themselves.
    """
    run, data, args = config.group(RunOptions), config.group(DataOptions), config.args
    templates: list[Any] = []
    if run.hf_checkpoint:
        yield from problem_of(lambda: templates.append(check_tokenizer(str(run.hf_checkpoint))))
    own_data = "data_source" in configured_hooks(args)
    paths = {"--prompt-data": None if own_data else data.prompt_data}
    if run.eval_interval is not None:
        paths["--eval-prompt-data"] = config.group(EvalOptions).eval_prompt_data
    template, messages = templates[0] if templates else None, takes_messages(args)
    for flag, path in paths.items():
        if path is None and not (own_data and flag == "--prompt-data"):
            yield f"{flag} is not set: name a JSONL file of prompts"
        elif path and (template or not data.apply_chat_template):
            prompts: list[Prompt] = []
            read = functools.partial(read_prompts, path, data, template, messages=messages)
            yield from problem_of(lambda read=read, prompts=prompts: prompts.extend(read()))
            kinds.update(str(prompt.metadata["rm_type"]) for prompt in prompts if prompt.metadata.get("rm_type"))
            if rewards.goes_by_kind(config):
                yield from (f"{flag} {path}: {text}" for text in prompt_problems(prompts, config.group(RewardOptions)))


def _lengths(config: RunConfig) -> Iterator[str]:
    """Check that a response of full length leaves room for a prompt in what an engine can hold."""
    run = config.group(RunOptions)
    file = Path(str(run.hf_checkpoint), "config.json")
    room = context_length(config) or (
        msgspec.json.decode(file.read_bytes()).get("max_position_embeddings") if file.is_file() else None
    )
    wanted = config.group(RolloutOptions).rollout_max_response_len
    if room is not None and wanted >= room:
        yield (
            f"--rollout-max-response-len {wanted} leaves no room for a prompt: the engine holds {room} tokens "
            "(--engine-max-total-len, SGLang's --sglang-context-length, or the model's max_position_embeddings)"
        )


def _determinism(config: RunConfig) -> Iterator[str]:
    """Check that the engines will run our own forward: transformers' rows depend on each other, to the last bit."""
    run, engine = config.group(RunOptions), config.group(LocalEngineOptions)
    if run.deterministic and config.group(RolloutOptions).partial_rollout:
        yield f"{PARTIAL_FLAG} with --deterministic: how far a response is when it is cut would be chance; drop one"
    if not run.deterministic or config.group(EngineFleetOptions).rollout_engine != "local":
        return
    if engine.engine_impl == "hf":
        yield "--deterministic needs our own forward: --engine-impl lean or auto, not hf"
    elif Path(str(run.hf_checkpoint), "config.json").is_file():
        try:
            LeanConfig.read(Path(str(run.hf_checkpoint)), engine.engine_max_total_len)
        except (CheckpointError, UnsupportedModelError) as error:
            yield f"--deterministic needs our own forward, and {error}"
