"""A migration as a run file: tables and keys of ours, and a comment for every flag that is not among them."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from miles_api.config import option_groups

if TYPE_CHECKING:
    from miles_api.migrate.translate import Entry, Left, Migration

__all__ = ["to_toml"]

_EXPONENT = re.compile(r"e(-?)0+")


def to_toml(migration: Migration) -> str:
    """Return TOML that `miles check` and `miles train` read; each line says where it came from."""
    lines = [
        f"# Written by `miles migrate` from {migration.script}. What is not taken over is named at the end.",
        f"# {migration.summary}",
        *([f"# {migration.warning}"] if migration.warning else []),
        "# Relative paths are looked up beside this file first.",
    ]
    for table in option_groups():
        entries = [entry for entry in migration.entries if entry.table == table]
        if entries:
            lines += ["", f"[{table}]", *(_line(entry) for entry in entries)]
    for title, left in (
        ("Without counterpart here", migration.lacking),
        ("Values that do not fit", migration.unfit),
        ("Could not be placed: packages are missing", migration.unplaced),
        ("Not needed here", migration.dropped),
    ):
        if left:
            lines += ["", f"# {title}:", *(_comment(one) for one in left)]
    if migration.notes:
        lines += ["", "# Notes:", *(f"#   {_one_line(note)}" for note in migration.notes)]
    return "\n".join(lines) + "\n"


def _line(entry: Entry) -> str:
    says = "; ".join(filter(None, (entry.place, entry.remark, f"LOOK: {entry.doubt}" if entry.doubt else "")))
    return f"{entry.key} = {_toml(entry.value)}" + (f"  # {_one_line(says)}" if says else "")


def _comment(left: Left) -> str:
    return f"#   {left.place}: {_one_line(left.flag)}: {_one_line(left.reason)}"


def _one_line(text: str) -> str:
    """Return a text that can stand in a comment."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(part) for part in value) + "]"
    if value is None:
        return '"null"'
    if isinstance(value, float):
        return _EXPONENT.sub(r"e\1", repr(value))
    # JSON's strings, numbers and booleans are TOML's, but for one control character.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
