"""Options that hooks bring: a Struct as `fn.options`, or `fn.add_arguments(parser)`."""

from __future__ import annotations

import argparse
import inspect
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import HookValues
from miles_api.errors import HookError, HookLoadError, HookSignatureError
from miles_api.hook_options import specs_by_field
from miles_api.loading.load import import_reference, unwrapped
from miles_api.options import flag_of, option_kind
from miles_api.parsing.flags import add_option_flags, option_strings
from miles_api.parsing.given import convert, locate, references
from miles_api.parsing.parser_arguments import ParserOptions

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from miles_api.parsing.given import Given
    from miles_api.parsing.run_file import RunFile
    from miles_api.spec import HookSpec

__all__ = ["Brought", "StructOptions", "brought_by_hooks", "without_clashes"]


class StructOptions:
    """The options of `fn.options = SomeStruct`; `ParserOptions` is the same for `fn.add_arguments`."""

    def __init__(self, kind: type[msgspec.Struct], owner: str, tables: list[str]) -> None:
        self.kind = kind
        self.owner = owner
        """Who brings them, in words."""
        self.tables = tables
        """The hooks in whose TOML table `[hooks.NAME]` they may stand; they are written to the first."""
        self.names = {**option_strings(kind), **{field: field for field in kind.__struct_fields__}}
        """Flags and field names, each with the field it sets."""
        self.parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        """The flags, to be given to the parser of the run as a parent."""
        add_option_flags(self.parser, {f"hooks.{tables[0]} ({owner})": kind})

    def values(self, given: Mapping[str, Given], problems: list[str]) -> HookValues:
        """Return every option, given or default; what does not fit or is missing is a problem."""
        before = len(problems)
        values = convert(self.kind, dict(given), problems)
        fields = msgspec.structs.fields(self.kind)
        missing = [info.name for info in fields if info.required and info.name not in given]
        problems += [f"{flag_of(name)} is not set, and {self.owner} needs it" for name in missing]
        if len(problems) > before and any(info.required for info in fields):
            return HookValues({})
        try:
            options = self.kind(**values)
        except (TypeError, ValueError) as error:
            # The Struct's own `__post_init__`: what one field says about another.
            problems.append(f"the options of {self.owner}: {error}")
            return HookValues({})
        secret = frozenset(info.name for info in fields if option_kind(info.type).secret)
        return HookValues({info.name: getattr(options, info.name) for info in fields}, secret)


Brought = StructOptions | ParserOptions


def brought_by_hooks(
    flags: Mapping[str, Any], file: RunFile, problems: list[str], unloaded: list[str]
) -> list[Brought]:
    """Import every hook that command line or file names, and return the options they bring.

    A hook that does not import is named in `unloaded`, but for one of the trainer that lacks another package here: the
    checks know where that will run. Options that cannot be read are `problems`.
    """
    found: dict[int, Brought] = {}
    given = {**file.top_level, **flags}
    for field, specs in specs_by_field().items():
        folder = None if field in flags else file.folder
        for reference in references(given.get(field)):
            located = locate(reference, folder)
            try:
                target = import_reference(located, short_names=specs[0].group, flag=flag_of(field))
            except HookLoadError as error:
                if specs[0].side != "train" or error.missing is None:
                    unloaded.append(str(error))
                continue
            try:
                _collect(found, unwrapped(target), f"the {specs[0].name} hook {reference}", specs)
            except HookError as error:
                problems.append(str(error))
    return list(found.values())


def _collect(found: dict[int, Brought], target: Any, owner: str, specs: list[HookSpec]) -> None:
    """Add what `target` brings; two hooks that bring the very same options have them once."""
    tables = [spec.name for spec in specs]
    for source in _sources(target, owner):
        known = found.get(id(source))
        if known is not None:
            known.tables += [table for table in tables if table not in known.tables]
        elif isinstance(source, type):
            found[id(source)] = StructOptions(source, owner, tables)
        else:
            found[id(source)] = ParserOptions(source, owner, tables)


def _sources(target: Any, owner: str) -> Iterator[Any]:
    kind, add_arguments = getattr(target, "options", None), getattr(target, "add_arguments", None)
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        yield kind
    elif kind is not None and inspect.isroutine(target):
        raise HookSignatureError(f"{owner}: its `options` is {kind!r}, not a msgspec Struct class")
    if callable(add_arguments):
        yield add_arguments


def without_clashes(
    groups: Mapping[str, type[msgspec.Struct]], brought: list[Brought], problems: list[str]
) -> list[Brought]:
    """Return the options whose names nobody else has; a clash is a problem that names both owners."""
    owners = {"config": "the run file", "-h": "miles", "--help": "miles"}
    for name, kind in groups.items():
        owner = f"the option group [{name}] of {kind.__module__.partition('.')[0]}"
        owners |= dict.fromkeys((*option_strings(kind), *kind.__struct_fields__), owner)
    kept = []
    for options in brought:
        taken = {name: owners[name] for name in options.names if name in owners}
        # A flag says more than the field it sets: `--toy-size`, not also `toy_size`.
        shown = {name: owner for name, owner in taken.items() if name.startswith("-")} or taken
        problems += [f"{name} is brought by {options.owner}, and {owner} has it too" for name, owner in shown.items()]
        if not taken:
            kept.append(options)
            owners |= dict.fromkeys(options.names, options.owner)
    return kept
