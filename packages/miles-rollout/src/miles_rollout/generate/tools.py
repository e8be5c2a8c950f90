"""One round of tool calls of the multi-turn generation."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_rollout.generate.tool_calls import BadToolCall, ToolCall
from miles_rollout.group import gather

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample
    from miles_rollout.generate.chat import Messages

__all__ = ["run_tools"]


async def run_tools(hook: BoundHook, sample: Sample, turn: int, calls: list[ToolCall | BadToolCall]) -> Messages:
    """Run the calls of one answer at once and return one message for each, in order; their time is not generation's.

    What a tool raises is raised here, with notes that name hook, sample and call: how failures are handled is the
    rollout's business. A malformed call runs nothing; the model is told.
    """
    started = time.perf_counter()
    try:
        return list(await gather(*(_run(hook, sample, turn, call) for call in calls)))
    finally:
        sample.non_generation_time += time.perf_counter() - started


async def _run(hook: BoundHook, sample: Sample, turn: int, call: ToolCall | BadToolCall) -> dict[str, Any]:
    if isinstance(call, BadToolCall):
        return {"role": "tool", "content": f"error: this tool call was not understood: {call.problem}"}
    try:
        output = await hook.acall(None, call.name, call.arguments)
        if not isinstance(output, str):
            hook.stats.errors += 1
            raise HookResultError(
                f"execute_tool hook {hook.reference} returned {type(output).__name__} for {call.name}, not text"
            )
    except asyncio.CancelledError:
        raise
    except Exception as error:
        error.add_note(f"on sample {sample.index}, turn {turn}: tool call {call.name}({call.arguments!r:.200})")
        raise
    return {"role": "tool", "name": call.name, "content": output}
