"""`args` for a replayed hook: the recorded run's options, with `--set` over them, and the hook's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import option_groups
from miles_api.errors import ConfigError, did_you_mean
from miles_api.loading.load import import_reference, unwrapped
from miles_api.parsing.given import Given, convert
from miles_api.parsing.hook_arguments import StructOptions
from miles_api.parsing.parser_arguments import ParserOptions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from miles_api.spec import HookSpec

__all__ = ["replay_options", "settings"]

_SET = "--set"


def settings(words: Sequence[str]) -> dict[str, Any]:
    """Read `option=value` words; a value is JSON, or text where it is none."""
    found: dict[str, Any] = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark:
            raise ConfigError(f"{_SET} {word}: expected OPTION=VALUE")
        try:
            decoded = msgspec.json.decode(value)
        except msgspec.DecodeError:
            decoded = value
        found[name.removeprefix("--").replace("-", "_")] = decoded
    return found


def replay_options(
    spec: HookSpec, reference: str, recorded: Mapping[str, Any], changes: Mapping[str, Any]
) -> dict[str, Any]:
    """Return every option by name, with `reference` standing where a run would name it.

    What the dump leaves out, secrets and options of newer packages, has its default. Raises `ConfigError` for a change
    that is no option or does not fit, `HookLoadError` for a reference that does not import.
    """
    problems: list[str] = []
    given = {name: Given(value, _SET) for name, value in changes.items()}
    flat = _recorded_options(recorded)
    known: set[str] = set()
    for group in option_groups().values():
        mine = {name: given[name] for name in group.__struct_fields__ if name in given}
        flat |= {name: value for name, value in convert(group, mine, problems).items() if name in mine}
        known |= {*group.__struct_fields__}
    for options in _brought(spec, reference):
        flat |= options.values(
            {name: Given(value, "the dump") for name, value in recorded.items()} | given, problems
        ).values
        known |= {*options.names.values()}
    # What another hook of the recorded run brought stays as it is written: nobody here knows its type.
    flat |= {name: value for name, value in changes.items() if name in recorded and name not in known}
    problems += [f"{_SET} {name}: no such option{did_you_mean(name, flat)}" for name in changes if name not in flat]
    if problems:
        raise ConfigError("\n".join(problems))
    return flat | _named(spec, reference)


def _recorded_options(recorded: Mapping[str, Any]) -> dict[str, Any]:
    defaults = {
        info.name: None if info.default is msgspec.NODEFAULT else info.default
        for group in option_groups().values()
        for info in msgspec.structs.fields(group)
    }
    return {**defaults, **recorded}


def _named(spec: HookSpec, reference: str) -> dict[str, Any]:
    """Return the options by which a run would name this hook and no other of the same flag."""
    named: dict[str, Any] = {spec.field: reference} if spec.field else {}
    if spec.needs:
        named[spec.needs.removeprefix("--").replace("-", "_")] = True
    elif spec.name == "reward":
        named["group_rm"] = False
    return named


def _brought(spec: HookSpec, reference: str) -> list[StructOptions | ParserOptions]:
    target = unwrapped(import_reference(reference, short_names=spec.group, flag=spec.flag or spec.name))
    found: list[StructOptions | ParserOptions] = []
    owner = f"the {spec.name} hook {reference}"
    kind, add_arguments = getattr(target, "options", None), getattr(target, "add_arguments", None)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        found.append(StructOptions(kind, owner, [spec.name]))
    if callable(add_arguments):
        found.append(ParserOptions(add_arguments, owner, [spec.name]))
    return found
