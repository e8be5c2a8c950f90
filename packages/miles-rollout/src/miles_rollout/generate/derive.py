"""What follows from the options for generation: which generate hook runs, and what cannot work with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.compat import translate
from miles_api.errors import ConfigError, HookError, problem_of
from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_rollout.generate.options import GenerateOptions
from miles_rollout.generate.tool_parsers import check_parser
from miles_rollout.generate.tool_specs import checked_specs
from miles_rollout.tokenizer_files import ChatTemplate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["derived", "idle", "problems"]

_AGENTIC, _MULTI_TURN = "agentic", "multi_turn"
_LOOP = "inference"
"""The default loop's short name: configuring it changes nothing."""
_CALLED_BY = {"agent": _AGENTIC, "agent_abort": _AGENTIC, "execute_tool": _MULTI_TURN, "tool_specs": _MULTI_TURN}


def derived(config: RunConfig) -> dict[str, str]:
    """Return the generate hook that follows from an agent or a tool hook, as `{option: value}`; empty where none does.

    A run that names its generate hook, or its whole rollout, or that samples nothing, decides for itself.
    """
    hooks, run = configured_hooks(config.args), config.group(RunOptions)
    own_loop = translate(hooks.get("rollout", [_LOOP])[0]) != _LOOP
    if "generate" in hooks or own_loop or run.loss_type == "sft_loss" or run.load_debug_rollout_data:
        return {}
    if "agent" in hooks:
        return {"custom_generate_function_path": _AGENTIC}
    return {"custom_generate_function_path": _MULTI_TURN} if "execute_tool" in hooks else {}


def idle(config: RunConfig) -> dict[str, str]:
    """Return the hooks for tools and agents that this run's generate hook does not call, with the reason."""
    runs = _generate(config)
    return {
        hook: f"{runs} does not call it" if runs in _CALLED_BY.values() else "that is up to the generate hook"
        for hook, by in _CALLED_BY.items()
        if by != runs
    }


def problems(config: RunConfig) -> Iterator[str]:
    """Yield what does not fit together: a generate hook without what it calls, two at once, malformed tools."""
    hooks, runs = configured_hooks(config.args), _generate(config)
    if runs == _MULTI_TURN and "execute_tool" not in hooks:
        yield "multi_turn runs tools, and none is set: pass --generate-execute-tool-function-path"
    if runs == _AGENTIC and "agent" not in hooks:
        yield "agentic runs an agent, and none is set: pass --custom-agent-function-path"
    if runs == _AGENTIC and "execute_tool" in hooks:
        yield (
            "--custom-agent-function-path and --generate-execute-tool-function-path are both set, and an agent runs "
            "its own tools: drop one"
        )
    if runs in (_MULTI_TURN, _AGENTIC):
        yield from problem_of(lambda: _require_template(config))
    if runs == _MULTI_TURN:
        yield from _tool_problems(config)
    for reference in hooks.get("tool_specs", ()):
        try:
            hook = resolve(REGISTRY["tool_specs"], reference)
        except HookError:
            continue  # reported with all other hooks that do not load
        yield from problem_of(lambda hook=hook: checked_specs(hook))


def _tool_problems(config: RunConfig) -> Iterator[str]:
    name, folder = config.group(GenerateOptions).generate_tool_call_parser, config.group(RunOptions).hf_checkpoint
    yield from problem_of(lambda: check_parser(name, str(folder), _own_template(config)))
    if "tool_specs" in configured_hooks(config.args) and config.flat()["apply_chat_template"]:
        yield (
            "--apply-chat-template turns prompts into text before --generate-tool-specs-path can describe the tools in "
            "them: leave it out and give chat messages"
        )


def _own_template(config: RunConfig) -> str | None:
    return config.flat()["apply_chat_template_kwargs"].get("chat_template")


def _require_template(config: RunConfig) -> None:
    """Raise `ConfigError` for a model directory without a chat template: turns cannot be told apart without one."""
    folder = str(config.group(RunOptions).hf_checkpoint)
    if Path(folder).is_dir() and not (_own_template(config) or ChatTemplate(folder).text):
        raise ConfigError(
            f"{_generate(config)} holds conversations, and the tokenizer in --hf-checkpoint {folder} has no chat "
            'template: give one with --apply-chat-template-kwargs \'{"chat_template": "…"}\', or name a generate hook '
            "that needs none"
        )


def _generate(config: RunConfig) -> str:
    named = configured_hooks(config.args).get("generate", [])
    return named[0] if named else derived(config).get("custom_generate_function_path", "single_turn")
