"""From TOML files and a command line to a `RunConfig`, with every problem in one report."""

from __future__ import annotations

import argparse
import json
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from miles_api.config import RunConfig, option_groups
from miles_api.errors import ConfigError, HookError, did_you_mean
from miles_api.hook_options import specs_by_field
from miles_api.load import import_reference
from miles_api.options import OptionKind, field_docs, flag_of, option_kind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add_option_flags", "parse_run"]

_COMMAND_LINE = "command line"


class _Found(msgspec.Struct):
    """A raw value and where it was written."""

    value: Any
    source: str
    folder: Path | None = None
    """The TOML file's folder; None on the command line."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def parse_run(argv: Sequence[str], *, prog: str = "miles train") -> RunConfig:
    """Read `[RUN.toml] [--flag value …]`; the command line wins over TOML, TOML over defaults.

    Hook references are imported first, because a hook may bring options of its own. Raises `ConfigError` that lists
    all problems, each naming flag or key, value, file and what was expected.
    """
    problems: list[str] = []
    groups: dict[str, type[msgspec.Struct]] = dict(option_groups())
    first, rest = _parser(groups, prog).parse_known_args(argv)
    tables, toml_path = _read_toml(first.config, problems)
    extra = _hook_options(vars(first), tables, toml_path, problems)
    if extra:
        first, rest = _parser({**groups, **extra}, prog).parse_known_args(argv)
    all_groups = {**groups, **{f"hooks.{name}": kind for name, kind in extra.items()}}
    known = {flag_of(field) for kind in all_groups.values() for field in kind.__struct_fields__}
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    problems += [f"unknown flag {flag}{did_you_mean(flag, known)}" for flag in flags or rest]
    found = _from_toml(tables, all_groups, toml_path, problems)
    found.update({k: _Found(v, _COMMAND_LINE) for k, v in vars(first).items() if k != "config"})
    values = {name: _convert(kind, found, problems) for name, kind in all_groups.items()}
    if problems:
        raise ConfigError("\n".join(problems))
    return RunConfig(
        {name: kind(**values[name]) for name, kind in groups.items()},
        {key: item.source for key, item in found.items()},
        {name: kind(**values[f"hooks.{name}"]) for name, kind in extra.items()},
    )


def add_option_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type[msgspec.Struct]]) -> None:
    """Add one flag for each field, with the group's docstring as heading and the field's as help."""
    for name, kind in groups.items():
        section = parser.add_argument_group(name, (kind.__doc__ or "").strip().partition("\n")[0])
        docs = field_docs(kind)
        for field, info in zip(kind.__struct_fields__, msgspec.structs.fields(kind), strict=True):
            section.add_argument(
                flag_of(field), **_argparse_settings(option_kind(info.type), info.default, docs, field)
            )


def _argparse_settings(kind: OptionKind, default: Any, docs: dict[str, str], field: str) -> dict[str, Any]:
    text = " ".join(docs.get(field, "").split()).replace("%", "%%")
    if default not in (None, msgspec.NODEFAULT):
        text += f" (default: {default})"
    settings: dict[str, Any] = {"dest": field, "default": argparse.SUPPRESS, "help": text}
    if kind.base is bool:
        return {**settings, "action": argparse.BooleanOptionalAction}
    settings["metavar"] = "{" + ",".join(map(str, kind.base)) + "}" if isinstance(kind.base, tuple) else field.upper()
    if kind.base is list:
        settings["action"] = "append"
        settings["help"] += " (repeat the flag for each)"
    return settings


def _parser(groups: dict[str, type[msgspec.Struct]], prog: str) -> _Parser:
    parser = _Parser(prog=prog, allow_abbrev=False)
    parser.add_argument("config", nargs="?", help="TOML file that describes the run")
    add_option_flags(parser, groups)
    return parser


def _read_toml(path: str | None, problems: list[str]) -> tuple[dict[str, Any], Path | None]:
    if path is None:
        return {}, None
    file = Path(path)
    if not file.is_file():
        problems.append(f"there is no run file {path}")
        return {}, None
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")), file.resolve()
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path} is not TOML: {error}")
        return {}, file.resolve()


def _hook_options(
    flags: dict[str, Any], tables: dict[str, Any], toml_path: Path | None, problems: list[str]
) -> dict[str, type[msgspec.Struct]]:
    """Import every configured hook and collect the option Structs they bring as `fn.options`."""
    given = {**_table(tables, "hooks"), **flags}
    brought: dict[str, type[msgspec.Struct]] = {}
    for field, specs in specs_by_field().items():
        from_toml = field not in flags
        for reference in _references(given.get(field)):
            located = _locate(reference, toml_path.parent if toml_path and from_toml else None)
            try:
                target = import_reference(located, short_names=specs[0].group, flag=flag_of(field))
            except HookError as error:
                problems.append(str(error))
                continue
            if isinstance(options := getattr(target, "options", None), type) and issubclass(options, msgspec.Struct):
                brought[specs[0].name] = options
    return brought


def _table(tables: dict[str, Any], name: str) -> dict[str, Any]:
    return tables[name] if isinstance(tables.get(name), dict) else {}


def _references(value: Any) -> list[str]:
    """Split references; what is no text at all is refused where values are converted."""
    parts = value if isinstance(value, list) else [value]
    return [piece.strip() for part in parts if isinstance(part, str) for piece in part.split(",") if piece.strip()]


def _locate(reference: str, folder: Path | None) -> str:
    """Make a file reference absolute: beside the TOML file that names it, or below the current directory."""
    path, mark, attribute = reference.rpartition(":")
    if not mark or not path.endswith(".py"):
        return reference
    return str(((folder or Path.cwd()) / Path(path).expanduser()).resolve()) + mark + attribute


class _Taker:
    """Takes values out of a TOML file's tables, and notes those that belong nowhere."""

    def __init__(self, groups: dict[str, type[msgspec.Struct]], path: Path | None, problems: list[str]) -> None:
        self.owner = {field: name for name, kind in groups.items() for field in kind.__struct_fields__}
        self.found: dict[str, _Found] = {}
        self.name = path.name if path else ""
        self._folder = path.parent if path else None
        self._problems = problems

    def take(self, table: str | None, key: str, value: Any) -> None:
        where = f"{self.name} [{table}]" if table else self.name
        if key not in self.owner:
            self._problems.append(f"{where}: unknown key {key!r}{did_you_mean(key, self.owner)}")
        elif table is not None and self.owner[key] != table:
            self._problems.append(f"{where}: {key} belongs in [{self.owner[key]}]")
        else:
            self.found[key] = _Found(value, self.name, self._folder)


def _from_toml(
    tables: dict[str, Any], groups: dict[str, type[msgspec.Struct]], path: Path | None, problems: list[str]
) -> dict[str, _Found]:
    """Take top-level keys, tables of a group, and `[hooks.NAME]`, the options that a hook brought."""
    taker = _Taker(groups, path, problems)
    hook_tables = {key: value for key, value in _table(tables, "hooks").items() if isinstance(value, dict)}
    for name, value in tables.items():
        if not isinstance(value, dict) or name in taker.owner:
            taker.take(None, name, value)
        elif name not in groups:
            problems.append(f"{taker.name}: unknown table [{name}]{did_you_mean(name, groups)}")
        else:
            for key in [key for key in value if name != "hooks" or key not in hook_tables]:
                taker.take(name, key, value[key])
    for hook, options in hook_tables.items():
        if f"hooks.{hook}" not in groups:
            problems.append(f"{taker.name}: no configured hook takes options [hooks.{hook}]")
            continue
        for key, value in options.items():
            taker.take(f"hooks.{hook}", key, value)
    return taker.found


def _convert(kind: type[msgspec.Struct], found: dict[str, _Found], problems: list[str]) -> dict[str, Any]:
    """Convert the fields of one group, collecting a problem for each that does not fit."""
    values: dict[str, Any] = {}
    hook_fields = specs_by_field()
    for info in msgspec.structs.fields(kind):
        item = found.get(info.name)
        shape = option_kind(info.type)
        if item is None:
            if shape.path == "output" and isinstance(info.default, str):
                values[info.name] = str(Path(info.default).resolve())
            continue
        try:
            if info.name in hook_fields:
                values[info.name] = _hook_value(item, hook_fields[info.name][0].many)
            else:
                values[info.name] = _path(msgspec.convert(_raw(item, shape), info.type, strict=False), shape, item)
        except (msgspec.ValidationError, ValueError) as error:
            problems.append(_explain(info.name, shape, item, error))
    return values


def _hook_value(item: _Found, many: bool) -> Any:
    parts = item.value if isinstance(item.value, list) else [item.value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("Expected `str`, the name of a hook")
    located = [_locate(reference, item.folder) for reference in _references(item.value)]
    if len(located) > 1 and not many:
        raise ValueError("takes one reference")
    return located[0] if len(located) == 1 else located or None


def _raw(item: _Found, shape: OptionKind) -> Any:
    if item.source == _COMMAND_LINE and shape.base is dict:
        return json.loads(item.value)
    # Numbers and booleans in a TOML file are typed already: a quoted one is a mistake worth naming.
    if item.source != _COMMAND_LINE and isinstance(item.value, str) and shape.base in (int, float, bool):
        raise ValueError(f"Expected `{shape.base.__name__}`, got a quoted string")
    if shape.base is bool and not isinstance(item.value, bool):
        raise ValueError(f"Expected `bool`, got `{type(item.value).__name__}`")
    return item.value


def _path(value: Any, shape: OptionKind, item: _Found) -> Any:
    if not shape.path or not isinstance(value, str):
        return value
    located = (item.folder or Path.cwd()) / Path(value).expanduser()
    # A name that is no file here may be a name on a model hub.
    return str(located.resolve()) if shape.path == "output" or located.exists() else value


def _explain(name: str, shape: OptionKind, item: _Found, error: Exception) -> str:
    shown = flag_of(name) if item.source == _COMMAND_LINE else f"{item.source}: {name}"
    text = f"{shown} = {item.value!r}: {str(error).partition(' - at')[0]}"
    if isinstance(shape.base, tuple):
        text += f"; choose from {', '.join(map(str, shape.base))}{did_you_mean(str(item.value), map(str, shape.base))}"
    return text
