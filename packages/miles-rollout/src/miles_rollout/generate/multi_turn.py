"""Conversations with tools: answer, run the tools that the answer calls, show their output, answer again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.options import options_from
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Sample, Status
from miles_rollout.generate.chat import ChatTemplate, Messages, prompt_ids, spoken
from miles_rollout.generate.options import GenerateOptions
from miles_rollout.generate.tool_calls import BadToolCall, parse_tool_calls
from miles_rollout.generate.tool_specs import checked_specs
from miles_rollout.generate.tools import run_tools
from miles_rollout.generate.turn import ask, room

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook

__all__ = ["MultiTurn"]


class MultiTurn:
    """The generate hook `multi_turn`, built once: `--generate-execute-tool-function-path` runs the calls.

    Ids that the model generated stay as they are; tool output is tokenised once and left out of the loss. Turns and
    calls are counted in the sample's metadata: `turns`, `tool_calls`, `malformed_tool_calls`.
    """

    def __init__(self) -> None:
        self._specs: list[dict[str, Any]] | None = None

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
        """Hold one conversation and return it as one sample."""
        state, sample = input.state, input.sample
        execute, specs = state.hooks.need("execute_tool"), self._specs_of(state.hooks.one("tool_specs"))
        if not sample.tokens:
            sample.tokens = prompt_ids(state.tokenizer, input.args, sample, specs)
        template = ChatTemplate(state.tokenizer, input.args.apply_chat_template_kwargs, specs)
        await _converse(input, template, execute)
        return GenerateFnOutput(samples=sample)

    def _specs_of(self, hook: BoundHook | None) -> list[dict[str, Any]]:
        if self._specs is None:
            self._specs = checked_specs(hook) if hook is not None else []
            if hook is not None:
                hook.stats.calls += 1
        return self._specs


async def _converse(request: GenerateFnInput, template: ChatTemplate, execute: BoundHook) -> None:
    state, sample = request.state, request.sample
    options: GenerateOptions = options_from(request.args, GenerateOptions)
    # A text prompt has no messages; any will do as the past of a template that only appends.
    history: Messages = [{"role": "user", "content": ""}] if isinstance(sample.prompt, str) else list(sample.prompt)
    counts = {"turns": 0, "tool_calls": 0, "malformed_tool_calls": 0}
    sample.metadata = {**sample.metadata, **counts}
    for turn in range(options.generate_max_turns):
        left = room(request)
        if left == 0 or state.aborted:
            sample.append_response_tokens([], log_probs=[])
            sample.status = Status.ABORTED if state.aborted else Status.TRUNCATED
            return
        answer = await ask(request, sample.tokens, left, turn)
        answer.append_to(sample)
        sample.metadata["turns"] += 1
        if sample.status is not Status.COMPLETED:
            return
        text = spoken(state.tokenizer, answer.ids)
        _, calls = parse_tool_calls(text)
        if not calls:
            return
        sample.metadata["tool_calls"] += len(calls)
        sample.metadata["malformed_tool_calls"] += sum(isinstance(call, BadToolCall) for call in calls)
        if turn + 1 == options.generate_max_turns:
            break
        shown = await run_tools(execute, sample, turn, calls)
        ids = template.continuation(history, shown).after(answer.ids)
        if room(request, len(ids)) == 0:
            break
        _show(sample, state.tokenizer, ids, request.sampling_params)
        history += [{"role": "assistant", "content": text}, *shown]
    sample.status = Status.TRUNCATED


def _show(sample: Sample, tokenizer: Any, ids: list[int], params: dict[str, Any]) -> None:
    text = tokenizer.decode(ids, skip_special_tokens=params.get("skip_special_tokens", True))
    sample.append_response_tokens(ids, text=text, trainable=False)
