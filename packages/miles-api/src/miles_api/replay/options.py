"""`args` for a replayed hook: the recorded run's options, with `--set` over them, and the hook's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import option_groups
from miles_api.errors import ConfigError, did_you_mean
from miles_api.loading.load import import_reference, unwrapped
from miles_api.older_options import older_option
from miles_api.parsing.given import Given, convert
from miles_api.parsing.hook_arguments import StructOptions
from miles_api.parsing.parser_arguments import ParserOptions
from miles_api.testing.options import ReliedOn

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

    What the dump leaves out, secrets and options of newer or missing packages, has its default. Raises `ConfigError`
    for a change that is no option or does not fit, `HookLoadError` for a reference that does not import.
    """
    problems: list[str] = []
    given = {name: Given(value, _SET) for name, value in changes.items()}
    flat = _recorded_options(recorded)
    known: set[str] = set()
    for group in (*option_groups().values(), ReliedOn):
        # An installed package knows better what its option may be.
        mine = {name: given[name] for name in group.__struct_fields__ if name in given and name not in known}
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
    flat = {**_defaults(*option_groups().values()), **recorded}
    return {**{name: value for name, value in _defaults(ReliedOn).items() if not _is_older(name, flat)}, **flat}


def _defaults(*groups: type[msgspec.Struct]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for info in (info for group in groups for info in msgspec.structs.fields(group)):
        if info.default_factory is not msgspec.NODEFAULT:
            found[info.name] = info.default_factory()
        else:
            found[info.name] = None if info.default is msgspec.NODEFAULT else info.default
    return found


def _is_older(name: str, options: Mapping[str, Any]) -> bool:
    """Say whether `args` finds an option of older stacks in `options` under its newer name."""
    try:
        older_option(name, options)
    except KeyError:
        return False
    return True


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
