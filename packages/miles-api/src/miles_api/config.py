"""`RunConfig`: every option of a run, typed by group, with the place each value came from."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec

from miles_api.args import Args
from miles_api.errors import ConfigError
from miles_api.loading.load import entry_points
from miles_api.options import Options, foreign_fields, option_kind

__all__ = ["DERIVED", "HookValues", "RunConfig", "option_groups"]

DERIVED = "derived"
"""The source of a value that follows from other options."""

Group = TypeVar("Group", bound=msgspec.Struct)


@functools.cache
def option_groups() -> dict[str, type[Options]]:
    """Return every installed option group by its TOML table; two fields of one name are a `ConfigError`."""
    groups: dict[str, type[Options]] = {}
    owners: dict[str, str] = {}
    for name, points in sorted(entry_points("miles.options").items(), key=lambda item: (item[0] != "run", item[0])):
        if len({point.value for point in points}) > 1:
            raise ConfigError(f"option group {name!r} is offered twice: {', '.join(point.value for point in points)}")
        groups[name] = points[0].load()
        for field in groups[name].__struct_fields__:
            if field in owners:
                raise ConfigError(f"option {field!r} stands in two groups: {owners[field]} and {points[0].value}")
            owners[field] = points[0].value
    return groups


class HookValues(msgspec.Struct, frozen=True):
    """The options that the hooks of one name brought along, as plain values: another process may lack their class."""

    values: dict[str, Any]
    secret: frozenset[str] = frozenset()
    """Those that are never written to a file."""


class RunConfig(msgspec.Struct, frozen=True):
    """The resolved options of a run. Framework code takes its own group; only hooks see the flat `args`."""

    groups: dict[str, Any]
    """Option Structs by TOML table."""
    sources: dict[str, str]
    """Where each value that is not a default came from: a TOML file, `command line` or `derived`."""
    extra: dict[str, HookValues] = {}
    """Options that hooks brought along, by hook name."""

    @classmethod
    def of(cls, *groups: Options) -> RunConfig:
        """Build a config from Structs; groups that are not given take their defaults."""
        by_type = {type(group): group for group in groups}
        return cls({name: by_type.get(kind) or kind() for name, kind in option_groups().items()}, {})

    def group(self, kind: type[Group]) -> Group:
        """Return the options of one group."""
        for options in self.groups.values():
            if type(options) is kind:
                return options
        raise ConfigError(f"this run has no option group {kind.__name__}; is its package installed?")

    @property
    def args(self) -> Args:
        """Return the flat view that hooks receive, with an empty overlay."""
        return Args(self.flat())

    def flat(self) -> dict[str, Any]:
        """Return every option by name."""
        flat = {field: getattr(group, field) for group in self.groups.values() for field in group.__struct_fields__}
        for table, field in self._foreign().items():
            flat |= {f"{table}_{name}": value for name, value in flat[field].items()}
        return {**flat, **{field: value for brought in self.extra.values() for field, value in brought.values.items()}}

    def _foreign(self) -> dict[str, str]:
        return foreign_fields({name: type(group) for name, group in self.groups.items()})

    def public(self) -> dict[str, Any]:
        """Return every option by name but the secret ones: what may be written to files and sent to loggers."""
        parts = [*self.groups.values(), *self.extra.values()]
        return {key: value for part in parts for key, value in _public(part).items()}

    def replace(self, source: str = DERIVED, **changes: Any) -> RunConfig:
        """Return a config with other values, recorded as coming from `source`."""
        groups = dict(self.groups)
        for name, options in self.groups.items():
            mine = {key: value for key, value in changes.items() if key in options.__struct_fields__}
            if mine:
                groups[name] = msgspec.structs.replace(options, **mine)
        return RunConfig(groups, {**self.sources, **dict.fromkeys(changes, source)}, self.extra)

    def to_toml(self) -> str:
        """Return the whole config as TOML that `miles train` reads back; each set value says where it came from."""
        lines: list[str] = ["# The resolved options of this run. Values without a remark are defaults."]
        programs = self._foreign()
        for name, options in self.groups.items():
            values = _public(options)
            theirs = values.pop(programs[name]) if name in programs else {}
            lines += ["", f"[{name}]", *_assignments(values, self.sources, _public(type(options)()))]
            sources = {key: self.sources[f"{name}_{key}"] for key in theirs if f"{name}_{key}" in self.sources}
            lines += _assignments(theirs, sources, {})
        for name, options in self.extra.items():
            lines += ["", f"[hooks.{name}]", *_assignments(_public(options), self.sources, {})]
        return "\n".join(lines) + "\n"


def _public(options: msgspec.Struct) -> dict[str, Any]:
    """Return the values that may be written to a file: a token or password (`extra={"secret": True}`) may not."""
    if isinstance(options, HookValues):
        return {key: value for key, value in options.values.items() if key not in options.secret}
    secret = {info.name for info in msgspec.structs.fields(options) if option_kind(info.type).secret}
    return {key: value for key, value in msgspec.structs.asdict(options).items() if key not in secret}


def _assignments(values: Mapping[str, Any], sources: Mapping[str, str], defaults: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        if value is None:
            lines.append(f"# {key} is not set" if defaults.get(key) is None else f'{key} = "null"')
        elif sources.get(key) == DERIVED:
            # A comment, so that the file still follows when one of the values it derives from is changed.
            lines.append(f"# {key} = {_toml(value)} follows from the others")
        else:
            lines.append(f"{key} = {_toml(value)}" + (f"  # {sources[key]}" if key in sources else ""))
    return lines


def _toml(value: Any) -> str:
    # JSON strings, numbers, booleans and lists are TOML; only tables differ.
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(k))} = {_toml(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return repr(value)  # inf and nan, which JSON has no word for
    return json.dumps(value, ensure_ascii=False, default=str)
