"""One command-line flag for each field of an option Struct."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.options import OptionKind, field_docs, flag_of, foreign_fields, option_kind, own_fields

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["UNSET", "add_option_flags", "option_strings"]

UNSET = "null"
"""The word for an option that is not set, on a command line and in TOML, which has none of its own."""
_TO_NULL = f"={UNSET}"


def add_option_flags(parser: argparse.ArgumentParser, groups: Mapping[str, type[msgspec.Struct]]) -> None:
    """Add one flag for each field, with the group's docstring as heading and the field's as help.

    Values stay text: what converts and checks them is the Struct.
    """
    for name, kind in groups.items():
        docs = field_docs(kind)
        about = [(kind.__doc__ or "").strip().partition("\n")[0]]
        about += [f"--{name}-…: {docs.get(field, '')}" for field in foreign_fields({name: kind}).values()]
        section = parser.add_argument_group(name, " ".join(" ".join(about).split()))
        for info in own_fields(kind):
            settings = _settings(option_kind(info.type), info.default, docs, info.name)
            section.add_argument(flag_of(info.name), **settings)


def option_strings(kind: type[msgspec.Struct]) -> dict[str, str]:
    """Return every flag that `add_option_flags` adds for a group, with its field."""
    fields = {flag_of(info.name): info.name for info in own_fields(kind)}
    switches = [info.name for info in own_fields(kind) if option_kind(info.type).base is bool]
    return {**fields, **{"--no-" + flag_of(name)[2:]: name for name in switches}}


class _OptionalSwitch(argparse.BooleanOptionalAction):
    """A switch that may also be left to the program: `--flag=null`, where a TOML file says otherwise."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, dest, **settings)
        # argparse looks for a whole word before it looks for an equals sign.
        self.option_strings = [*self.option_strings, option_strings[0] + _TO_NULL]

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if str(option_string).endswith(_TO_NULL):
            setattr(namespace, self.dest, UNSET)
        else:
            super().__call__(parser, namespace, values, option_string)


def _settings(kind: OptionKind, default: Any, docs: dict[str, str], field: str) -> dict[str, Any]:
    text = " ".join(docs.get(field, "").split())
    if default not in (None, msgspec.NODEFAULT):
        text += f" (default: {default})"
    settings: dict[str, Any] = {"dest": field, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
    if kind.base is bool:
        return {**settings, "action": _OptionalSwitch if kind.optional else argparse.BooleanOptionalAction}
    settings["metavar"] = "{" + ",".join(map(str, kind.base)) + "}" if isinstance(kind.base, tuple) else field.upper()
    if kind.base is list:
        settings["action"] = "append"
        settings["help"] += " (repeat the flag for each)"
    return settings
