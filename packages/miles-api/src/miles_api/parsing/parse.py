"""From TOML files and a command line to a `RunConfig`, with every problem in one report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from miles_api.config import HookValues, RunConfig, option_groups
from miles_api.errors import ConfigError, did_you_mean
from miles_api.options import foreign_fields, own_fields
from miles_api.parsing.flags import add_option_flags, option_strings
from miles_api.parsing.foreign import foreign_values, take_foreign
from miles_api.parsing.given import COMMAND_LINE, Given, convert
from miles_api.parsing.hook_arguments import Brought, brought_by_hooks, without_clashes
from miles_api.parsing.run_file import RunFile

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add_option_flags", "parse_run"]

Groups = dict[str, type[msgspec.Struct]]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


class _Words(msgspec.Struct):
    """What the words of a command line say once it is known which hooks bring options."""

    flags: dict[str, Any]
    """Values by option; the run file under `config`."""
    unknown: list[str]
    file: RunFile
    brought: list[Brought]
    problems: list[str]


def parse_run(argv: Sequence[str], *, prog: str = "miles train", problems: list[str] | None = None) -> RunConfig:
    """Read `[RUN.toml] [--flag value …]`; the command line wins over TOML, TOML over defaults.

    Hook references are imported first, because a hook may bring options of its own. Raises `ConfigError` that lists
    all problems, each naming flag or key, value, file and what was expected. A caller that goes on to check the run
    gives a list instead: problems are appended there, a value that cannot be read keeps its default, and hooks that do
    not load are left to the check.
    """
    strict = problems is None
    problems = [] if problems is None else problems
    groups: Groups = dict(option_groups())
    argv, foreign = take_foreign(argv, groups)
    words = _read(argv, groups, prog, strict)
    problems += words.problems
    owners, programs = _owners(groups, words.brought), foreign_fields(groups)
    given = words.file.values(owners, problems, programs)
    flags = {**{name: value for name, value in words.flags.items() if name != "config"}, **foreign}
    given.update({name: Given(value, COMMAND_LINE) for name, value in flags.items()})
    values = {name: convert(kind, given, problems) for name, kind in groups.items()}
    for table, field in programs.items():
        values[table][field] = foreign_values(table, given, owners)
    extra = _hook_values(words.brought, given, problems)
    problems += _unknown(words.unknown, groups, words.brought)
    if problems and strict:
        raise ConfigError("\n".join(problems))
    return RunConfig(
        {name: kind(**values[name]) for name, kind in groups.items()},
        {name: item.source for name, item in given.items()},
        extra,
    )


def _read(argv: Sequence[str], groups: Groups, prog: str, strict: bool) -> _Words:
    """Find the run file, import the hooks that it and the flags name, and parse again with the options they bring."""
    first, rest = _parser(groups, prog).parse_known_args(argv)
    words = _read_with(_likely_file(rest), vars(first), argv, groups, prog, strict)
    if not words.unknown and words.flags.get("config") != words.file.path:
        # Only now is it known which words are values of the hooks' own flags.
        words = _read_with(words.flags.get("config"), vars(first), argv, groups, prog, strict)
    return words


def _read_with(
    path: str | None, flags: Mapping[str, Any], argv: Sequence[str], groups: Groups, prog: str, strict: bool
) -> _Words:
    problems: list[str] = []
    unloaded: list[str] = []
    file = RunFile(path, problems)
    brought = without_clashes(groups, brought_by_hooks(flags, file, problems, unloaded), problems)
    parser = _parser(groups, prog, brought)
    parser.add_argument("config", nargs="?", help="TOML file that describes the run")
    found, rest = parser.parse_known_args(argv)
    return _Words(vars(found), rest, file, brought, problems + (unloaded if strict else []))


def _parser(groups: Groups, prog: str, brought: Sequence[Brought] = ()) -> _Parser:
    parser = _Parser(prog=prog, allow_abbrev=False, parents=[options.parser for options in brought])
    add_option_flags(parser, groups)
    return parser


def _likely_file(rest: list[str]) -> str | None:
    """Guess which of the words that the framework's flags left over is the run file: others are of hooks' flags."""
    free = [
        word
        for before, word in zip(["", *rest], rest, strict=False)
        if not word.startswith("-") and (not before.startswith("-") or "=" in before)
    ]
    named = [word for word in rest if word.endswith(".toml")]
    return next(iter([*[word for word in free if word in named], *free, *named]), None)


def _owners(groups: Groups, brought: list[Brought]) -> dict[str, tuple[str, ...]]:
    """Return the TOML tables in which each option may stand."""
    owners: dict[str, tuple[str, ...]] = {
        info.name: (name,) for name, kind in groups.items() for info in own_fields(kind)
    }
    for options in brought:
        owners |= dict.fromkeys(options.names.values(), tuple(f"hooks.{table}" for table in options.tables))
    return owners


def _hook_values(brought: list[Brought], given: dict[str, Given], problems: list[str]) -> dict[str, HookValues]:
    """Return the options that hooks brought, those of one table together."""
    extra: dict[str, HookValues] = {}
    for options in brought:
        mine, before = options.values(given, problems), extra.get(options.tables[0], HookValues({}))
        extra[options.tables[0]] = HookValues({**before.values, **mine.values}, before.secret | mine.secret)
    return extra


def _unknown(rest: list[str], groups: Groups, brought: list[Brought]) -> list[str]:
    known = {flag for kind in groups.values() for flag in option_strings(kind)}
    known |= {name for options in brought for name in options.names if name.startswith("-")}
    flags = [word.partition("=")[0] for word in rest if word.startswith("--")]
    return [f"unknown flag {flag}{did_you_mean(flag, known)}" for flag in flags or rest]
