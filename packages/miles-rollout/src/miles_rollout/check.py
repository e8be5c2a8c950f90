"""What the rollout side can know to be wrong before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import problem_of
from miles_api.hookset import HookSet, configured_hooks
from miles_api.run_options import RunOptions
from miles_rollout.engines.local.options import LocalEngineOptions, check_loopback
from miles_rollout.hook_names import CALLED, CALLED_BY_LOOP
from miles_rollout.jsonl import read_prompts
from miles_rollout.options import DataOptions, EvalOptions, RewardOptions, RolloutOptions
from miles_rollout.rewards.dispatch import check_rm_type
from miles_rollout.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["HOOKS", "check", "idle"]

HOOKS = frozenset(CALLED)
"""The hooks that this package calls."""


def idle(config: RunConfig) -> dict[str, str]:
    """Return the hooks of this package that a run does not call, by name, with the reason."""
    reasons: dict[str, str] = {}
    if config.group(RunOptions).loss_type == "sft_loss":
        reasons = dict.fromkeys((*CALLED_BY_LOOP, "eval_rollout", "eval_rollout_log"), "supervised, nothing is sampled")
    elif "rollout" in configured_hooks(config.args):
        reasons = dict.fromkeys(CALLED_BY_LOOP, "unless the rollout hook calls it")
    if "data_source" in configured_hooks(config.args):
        reasons["buffer_filter"] = "unless the data source calls it"
    return reasons


def check(config: RunConfig) -> Iterator[str]:
    """Yield what does not fit: hooks, prompt files, tokenizer, reward."""
    run, data = config.group(RunOptions), config.group(DataOptions)
    yield from problem_of(lambda: HookSet(config.args, CALLED, build=False))
    tokenizers: list[Any] = []
    if run.hf_checkpoint:
        yield from problem_of(lambda: tokenizers.append(load_tokenizer(str(run.hf_checkpoint))))
    own_data = "data_source" in configured_hooks(config.args)
    paths = {"--prompt-data": None if own_data else data.prompt_data}
    if run.eval_interval is not None:
        paths["--eval-prompt-data"] = config.group(EvalOptions).eval_prompt_data
    for flag, path in paths.items():
        if path is None and not (own_data and flag == "--prompt-data"):
            yield f"{flag} is not set: name a JSONL file of prompts"
        elif path and (tokenizers or not data.apply_chat_template):
            yield from problem_of(lambda path=path: read_prompts(path, data, tokenizers[0] if tokenizers else None))
    if run.loss_type != "sft_loss":
        yield from _reward(config)
        yield from _lengths(config)
        yield from problem_of(lambda: check_loopback(config.group(LocalEngineOptions).engine_host))


def _reward(config: RunConfig) -> Iterator[str]:
    run, options = config.group(RunOptions), config.group(RewardOptions)
    configured = set(configured_hooks(config.args))
    if options.rm_type is not None and "reward" in configured:
        yield f"--rm-type {options.rm_type} and --custom-rm-path are both set, and only one reward can be: drop one"
    if options.rm_type is not None:
        yield from problem_of(lambda: check_rm_type(str(options.rm_type)))
    elif not {"reward", "group_reward", "generate", "rollout"} & configured:
        yield "no reward is set: pass --rm-type or --custom-rm-path"
    elif "group_reward" in configured and run.eval_interval is not None and not options.eval_group_rm:
        yield "--group-rm scores training alone: evaluation needs --eval-group-rm or an --rm-type"


def _lengths(config: RunConfig) -> Iterator[str]:
    """Check that a response of full length leaves room for a prompt in what an engine can hold."""
    run, engine = config.group(RunOptions), config.group(LocalEngineOptions)
    file = Path(str(run.hf_checkpoint), "config.json")
    room = engine.engine_max_total_len or (
        msgspec.json.decode(file.read_bytes()).get("max_position_embeddings") if file.is_file() else None
    )
    wanted = config.group(RolloutOptions).rollout_max_response_len
    if room is not None and wanted >= room:
        yield (
            f"--rollout-max-response-len {wanted} leaves no room for a prompt: the engine holds {room} tokens "
            "(--engine-max-total-len, or the model's max_position_embeddings)"
        )
