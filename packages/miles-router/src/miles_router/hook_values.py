"""The options that middleware brings: read by who starts the router, handed to its process in the environment.

Not on its command line, where a secret one would show.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError
from miles_api.packing import codec
from miles_api.parsing.given import COMMAND_LINE, Given
from miles_api.parsing.hook_arguments import brought_by_hooks, without_clashes
from miles_api.parsing.run_file import RunFile

from .options import RouterOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from miles_api.config import RunConfig
    from miles_api.parsing.hook_arguments import Brought

__all__ = ["VALUES_VARIABLE", "brought_by", "from_environment", "from_flags", "from_run", "to_environment"]

VALUES_VARIABLE = "MILES_ROUTER_HOOK_OPTIONS"
"""Where a router's process finds what its middleware's options are, as JSON."""
_FIELD = "miles_router_middleware_paths"


def brought_by(references: Sequence[str]) -> list[Brought]:
    """Import the middleware and return the options it brings.

    Raises `ConfigError` for options that cannot be read, or that have the name of one of the router's own.
    """
    problems: list[str] = []
    found = brought_by_hooks({_FIELD: list(references)}, RunFile(None, []), problems, unloaded := [])
    kept = without_clashes({"router": RouterOptions}, found, problems)
    if problems := problems + unloaded:
        raise ConfigError("\n".join(problems))
    return kept


def from_flags(brought: Sequence[Brought], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return every option of `brought`, from what a command line gave or its default. Raises `ConfigError`."""
    problems: list[str] = []
    given = {name: Given(value, COMMAND_LINE) for name, value in flags.items()}
    values = {name: value for options in brought for name, value in options.values(given, problems).values.items()}
    if problems:
        raise ConfigError("\n".join(problems))
    return values


def from_run(config: RunConfig, references: Sequence[str]) -> dict[str, Any]:
    """Return the options of a run that its middleware brought; those of its other hooks are none of a router's."""
    every = {name: value for brought in config.extra.values() for name, value in brought.values.items()}
    names = {name for options in brought_by(references) for name in options.names.values()} if every else set()
    return {name: value for name, value in every.items() if name in names}


def to_environment(values: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variable that carries `values`. Raises `WireError` for one that is no plain value."""
    if not values:
        return {}
    plain = {name: codec.to_json(value, f"the middleware option {name}") for name, value in values.items()}
    return {VALUES_VARIABLE: msgspec.json.encode(plain).decode()}


def from_environment() -> dict[str, Any] | None:
    """Return the values that whoever started this process gave; None if nobody did."""
    text = os.environ.get(VALUES_VARIABLE)
    return None if text is None else {k: codec.from_json(v, k) for k, v in msgspec.json.decode(text).items()}
