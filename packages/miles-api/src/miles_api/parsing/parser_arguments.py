"""What `fn.add_arguments(parser)` declared, read back so that a TOML file can set it too."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import HookValues
from miles_api.errors import HookSignatureError
from miles_api.options import flag_of
from miles_api.parsing.given import COMMAND_LINE, explain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from miles_api.parsing.given import Given

__all__ = ["ParserOptions"]


class ParserOptions:
    """The options of one `add_arguments`, which is called once, with a parser that is empty.

    Raises `HookSignatureError` when it fails or adds a positional argument. What it returns does not matter.
    """

    def __init__(self, add_arguments: Callable[[argparse.ArgumentParser], Any], owner: str, tables: list[str]) -> None:
        self.owner, self.tables = owner, tables
        self.parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        self.parser._optionals.title = f"hooks.{tables[0]} ({owner})"
        try:
            add_arguments(self.parser)
        except Exception as error:
            raise HookSignatureError(f"{owner}: its add_arguments raised {type(error).__name__}: {error}") from error
        self._actions: dict[str, argparse.Action] = {}
        self._defaults: dict[str, Any] = dict(self.parser._defaults)
        self.names = {dest: dest for dest in self._defaults}
        for action in self.parser._actions:
            self._note(action)
        self._one_of = [
            [action.dest for action in group._group_actions]
            for group in self.parser._mutually_exclusive_groups
            if group.required
        ]
        self._required = {action.dest for action in self.parser._actions if action.required}
        self._leave_defaults_out()

    def _note(self, action: argparse.Action) -> None:
        if not action.option_strings:
            raise HookSignatureError(f"{self.owner}: its add_arguments adds {action.dest!r}, which is not a --flag")
        self.names |= dict.fromkeys((*action.option_strings, action.dest), action.dest)
        self._actions.setdefault(action.dest, action)
        if self._defaults.get(action.dest) is None:
            self._defaults[action.dest] = _default(action)

    def _leave_defaults_out(self) -> None:
        """Let the parser report what stands on the command line and nothing else: the file comes before defaults."""
        self.parser._defaults.clear()
        for action in self.parser._actions:
            action.default, action.required = argparse.SUPPRESS, False
        for group in self.parser._mutually_exclusive_groups:
            group.required = False

    def values(self, given: Mapping[str, Given], problems: list[str]) -> HookValues:
        """Return every option, given or default; what does not fit or is missing is a problem."""
        values = dict(self._defaults)
        for field in [field for field in self._defaults if field in given]:
            item, action = given[field], self._actions.get(field)
            if item.source == COMMAND_LINE or action is None or item.value == self._defaults[field]:
                values[field] = item.value
                continue
            try:
                values[field] = _value(action, item.value, self._defaults[field])
            except (ValueError, TypeError, argparse.ArgumentTypeError, msgspec.ValidationError) as error:
                problems.append(explain(field, item, error))
        wanted = [[field] for field in self._required] + self._one_of
        problems += [
            f"{' or '.join(map(flag_of, fields))} is not set, and {self.owner} needs it"
            for fields in wanted
            if not given.keys() & set(fields)
        ]
        return HookValues(values)


def _default(action: argparse.Action) -> Any:
    """Return a default as argparse gives it: text goes through `type`, and SUPPRESS is none."""
    if action.default is argparse.SUPPRESS:
        return None
    if isinstance(action.default, str) and callable(action.type):
        return action.type(action.default)
    return action.default


def _value(action: argparse.Action, value: Any, default: Any) -> Any:
    """Convert a TOML value as the command line would, but for numbers and booleans, which TOML has itself."""
    if isinstance(action, argparse.BooleanOptionalAction) or isinstance(action.const, bool):
        if not isinstance(value, bool):
            raise ValueError(f"Expected `bool`, got `{type(value).__name__}`")
        return value
    if action.nargs == 0:
        return value
    many = isinstance(action.nargs, int) or action.nargs in ("*", "+")
    many = many or isinstance(action, argparse._AppendAction)
    if many != isinstance(value, list):
        raise ValueError("Expected a list" if many else "Expected one value, got a list")
    return _each(action, value, default) if many else _one(action, value, default)


def _each(action: argparse.Action, value: Any, default: Any) -> Any:
    return [_each(action, part, default) if isinstance(part, list) else _one(action, part, None) for part in value]


def _one(action: argparse.Action, value: Any, default: Any) -> Any:
    converted = value
    if action.type in (int, float):
        if isinstance(value, str):
            raise ValueError(f"Expected `{action.type.__name__}`, got a quoted string")
        converted = msgspec.convert(value, action.type)
    elif isinstance(value, str):
        converted = action.type(value) if callable(action.type) else value
    elif action.type in (None, str) and type(value) is not type(default):
        raise ValueError(f"Expected `str`, got `{type(value).__name__}`")
    if action.choices is not None and converted not in action.choices:
        raise ValueError(f"choose from {', '.join(map(str, action.choices))}")
    return converted
