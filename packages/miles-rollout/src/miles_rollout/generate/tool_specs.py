"""What tools a conversation has, as OpenAI describes them; the chat template shows them to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_rollout.generate.tool_calls import ToolCall

__all__ = ["checked_specs", "misfit"]


def checked_specs(hook: BoundHook) -> list[dict[str, Any]]:
    """Return the specifications that the hook `tool_specs` names; `ConfigError` if they are not a list of them."""
    flag, specs = hook.spec.flag, hook.target
    if not isinstance(specs, list | tuple):
        raise ConfigError(f"{flag} {hook.reference} is a {type(specs).__name__}, not a list of tool specifications")
    for number, spec in enumerate(specs):
        function = spec.get("function") if isinstance(spec, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ConfigError(
                f"{flag} {hook.reference}[{number}] is not an OpenAI tool specification: expected "
                f'{{"type": "function", "function": {{"name": …, "parameters": …}}}}, got {spec!r:.200}'
            )
    return list(specs)


def misfit(call: ToolCall, specs: list[dict[str, Any]]) -> str:
    """Return why a call fits none of the tools, in words for the model; empty where it does, or none is specified."""
    functions = {spec["function"]["name"]: spec["function"] for spec in specs}
    if not functions:
        return ""
    if call.name not in functions:
        return f"there is no tool {call.name!r}, only {', '.join(functions)}"
    wanted = (functions[call.name].get("parameters") or {}).get("required") or ()
    lacking = [name for name in wanted if name not in call.arguments]
    return f"{call.name} lacks {', '.join(lacking)}" if lacking else ""
