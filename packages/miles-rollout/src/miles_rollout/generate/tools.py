"""One round of tool calls of the multi-turn generation."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall
from miles_rollout.generate.tool_specs import misfit
from miles_rollout.group import gather

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample
    from miles_rollout.generate.chat import Messages
    from miles_rollout.generate.options import GenerateOptions
    from miles_rollout.generate.tool_calls import Calls

__all__ = ["COUNTS", "Tools"]

COUNTS = ("tool_calls", "malformed_tool_calls", "tool_timeouts")
"""What a sample's metadata counts of its calls."""

_GRACE = 5.0
"""Seconds a cancelled tool may take to clean up before it is left behind."""

_left_behind: set[asyncio.Future[Any]] = set()


class Tools:
    """The tools of a run: the hook that runs them, and their specifications."""

    def __init__(self, hook: BoundHook, specs: list[dict[str, Any]], options: GenerateOptions, tokenizer: Any) -> None:
        self.specs = specs
        self._hook = hook
        self._limit, self._longest = options.generate_tool_timeout, options.generate_max_tool_response_len
        self._tokenizer = tokenizer

    async def run(self, sample: Sample, turn: int, calls: Calls) -> Messages:
        """Run the calls of one answer at once and return one message for each, in order; count them in the sample.

        What a tool raises is raised here, with notes that name hook, sample and call: how failures are handled is the
        rollout's business. Of a call that is malformed, fits no tool or ran past `--generate-tool-timeout` the model is
        told. The time of tools is not generation's.
        """
        started = time.perf_counter()
        sample.metadata["tool_calls"] += len(calls)
        try:
            return list(await gather(*(self._one(sample, turn, call) for call in calls)))
        finally:
            sample.non_generation_time += time.perf_counter() - started

    async def _one(self, sample: Sample, turn: int, call: ToolCall | BadToolCall) -> dict[str, Any]:
        problem = call.problem if isinstance(call, BadToolCall) else misfit(call, self.specs)
        if isinstance(call, BadToolCall) or problem:
            sample.metadata["malformed_tool_calls"] += 1
            return {"role": "tool", "content": f"error: this tool call was not understood: {problem}"}
        try:
            output = await self._within(call)
        except asyncio.CancelledError:
            raise
        except Exception as error:
            error.add_note(f"on sample {sample.index}, turn {turn}: tool call {call.name}({call.arguments!r:.200})")
            raise
        if output is None:
            sample.metadata["tool_timeouts"] += 1
            output = f"error: {call.name} timed out after {self._limit:g} s"
        # Halves of characters, as in names of files that are no text, cannot be tokenised.
        output = output.encode(errors="replace").decode()
        return {"role": "tool", "name": call.name, "content": self._bounded(output)}

    async def _within(self, call: ToolCall) -> str | None:
        """Return what the hook says; None where its time is up."""
        hook = self._hook
        task = asyncio.ensure_future(hook.acall(None, call.name, call.arguments))
        try:
            done, _ = await asyncio.wait({task}, timeout=self._limit)
        except asyncio.CancelledError:
            await _give_up(task)
            raise
        if not done:
            await _give_up(task)
            hook.stats.timeouts += 1
            return None
        output = task.result()
        if not isinstance(output, str):
            hook.stats.errors += 1
            raise HookResultError(
                f"execute_tool hook {hook.reference} returned {type(output).__name__} for {call.name}, not text"
            )
        return output

    def _bounded(self, output: str) -> str:
        """Return an output of at most `--generate-max-tool-response-len` tokens: its beginning and its end."""
        if self._longest is None:
            return output
        ids = self._tokenizer.encode(output, add_special_tokens=False)
        if len(ids) <= self._longest:
            return output
        tail = self._longest // 2
        head = self._longest - tail
        shown = [self._tokenizer.decode(part) for part in (ids[:head], ids[len(ids) - tail :])]
        return f"\n[{len(ids) - self._longest} of {len(ids)} tokens left out]\n".join(shown)


async def _give_up(task: asyncio.Future[Any]) -> None:
    """Cancel, and wait a while: a tool that swallows the cancellation is left behind."""
    task.cancel()
    done, pending = await asyncio.wait({task}, timeout=_GRACE)
    for one in done:
        if not one.cancelled():
            one.exception()  # looked at: nobody asks for it any more
    _left_behind.update(pending)
    for one in pending:
        one.add_done_callback(_left_behind.discard)
