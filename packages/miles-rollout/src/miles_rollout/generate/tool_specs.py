"""What tools a conversation has, as OpenAI describes them; the chat template shows them to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook

__all__ = ["checked_specs"]


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
