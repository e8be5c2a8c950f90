"""Agent and tool hooks: conversations that the generation drives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args


@hook(flag="--custom-agent-function-path", since=(1, 0), side="rollout", moment="rollout", default="none")
async def agent(
    base_url: str,
    prompt: str | list[dict[str, Any]],
    request_kwargs: dict[str, Any],
    metadata: dict[str, Any],
    /,
    **kwargs: Any,
) -> dict[str, Any] | None:
    """Run one conversation against an OpenAI-compatible session at `base_url`.

    Called once per sample, concurrently. `request_kwargs` (model, temperature, top_p, max_tokens) go into each
    `client.chat.completions.create(messages=…, **request_kwargs)`; any API key will do. All that the model sees and
    says at `base_url` becomes the sample, and what it did not say itself is left out of the loss. A request that
    repeats the conversation and adds to it continues it; any other begins one of its own, which becomes a sample beside
    the first, of the same rollout. What it returns is merged into the samples' metadata. Of that, `reward` scores all
    of them, and `rewards` is left out and gives scores by the ids of completions: a sample takes that of the last of
    its answers named there. The reward hook is called where neither says anything.
    """
    raise NotImplementedError


@hook(
    flag=None,
    since=(1, 0),
    side="rollout",
    moment="sometimes",
    either_color=True,
    default="a function `abort` beside the agent",
)
async def agent_abort(args: Args, /) -> None:
    """Stop all conversations under way.

    Called once when a rollout is aborted while agents run, after the first of them was cancelled. It has no flag: a
    function `abort` that is defined in the agent function's module is taken.
    """
    raise NotImplementedError


@hook(flag="--generate-execute-tool-function-path", since=(1, 0), side="rollout", moment="sometimes", default="none")
async def execute_tool(name: str, params: dict[str, Any], /) -> str:
    """Run one tool call of the multi-turn generate and return its output as text.

    Called concurrently, once per parsed tool call; a call that cannot be parsed is answered without it. An exception
    is a failure of the whole conversation: for what the model should see and react to, return text.
    """
    raise NotImplementedError


@hook(flag="--generate-tool-specs-path", since=(1, 0), side="rollout", moment="start", kind="value", default="none")
def tool_specs() -> list[dict[str, Any]]:
    """Name a list of OpenAI tool specifications: a value, not a function.

    Read once when the rollout starts and given to the chat template.
    """
    raise NotImplementedError
