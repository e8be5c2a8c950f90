"""Conversations with tools: answer, run the tools that the answer calls, show their output, answer again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.options import options_from
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_rollout.generate.chat import ChatTemplate, prompt_ids
from miles_rollout.generate.conversation import UNFINISHED, Conversation
from miles_rollout.generate.options import GenerateOptions
from miles_rollout.generate.tool_parsers import parser_for
from miles_rollout.generate.tool_specs import checked_specs
from miles_rollout.generate.tools import Tools

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_rollout.generate.tool_calls import Parser

__all__ = ["MultiTurn"]


class _Run(NamedTuple):
    """What all conversations of a run share."""

    options: GenerateOptions
    template: ChatTemplate
    parser: Parser
    tools: Tools


class MultiTurn:
    """The generate hook `multi_turn`, built once: `--generate-execute-tool-function-path` runs the calls.

    Ids that the model generated stay as they are; tool output is tokenised once and left out of the loss. Turns, calls
    and tokens of tool output are counted in the sample's metadata: `turns`, `tool_calls`, `malformed_tool_calls`,
    `tool_timeouts`, `turn_timeouts`, `observation_tokens`.
    """

    def __init__(self) -> None:
        self._run: _Run | None = None

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
        """Hold one conversation and return it as one sample, or with `--generate-multi-samples` as one an answer."""
        run = self._run = self._run or _begin(input)
        sample = input.sample
        # What tools did until then and where the last answer broke off is in it only if it says so.
        if sample.response_length and UNFINISHED not in sample.metadata:
            sample.reset_for_retry()
        if not sample.tokens:
            sample.tokens = prompt_ids(input.state.tokenizer, input.args, sample, run.tools.specs)
        samples = await Conversation(input, *run).hold()
        return GenerateFnOutput(samples=samples if len(samples) > 1 else samples[0])


def _begin(request: GenerateFnInput) -> _Run:
    state, options = request.state, options_from(request.args, GenerateOptions)
    specs = _specs_of(state.hooks.one("tool_specs"))
    return _Run(
        options,
        ChatTemplate(state.tokenizer, request.args.apply_chat_template_kwargs, specs),
        parser_for(request.args, state.tokenizer),
        Tools(state.hooks.need("execute_tool"), specs, options, state.tokenizer),
    )


def _specs_of(hook: BoundHook | None) -> list[dict[str, Any]]:
    if hook is None:
        return []
    hook.stats.calls += 1
    return checked_specs(hook)
