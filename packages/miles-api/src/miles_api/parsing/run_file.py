"""The TOML file of a run: top-level keys, one table for each option group, `[hooks.NAME]` for what a hook brought."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import did_you_mean
from miles_api.parsing.given import Given

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

__all__ = ["RunFile"]


class RunFile:
    """What was read of the file that a run names; empty where it names none."""

    def __init__(self, path: str | None, problems: list[str]) -> None:
        self.path = path
        self._tables: dict[str, Any] = {}
        self.folder = Path(path).resolve().parent if path is not None else None
        self.name = Path(path).name if path is not None else ""
        if path is None:
            return
        try:
            self._tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            problems.append(f"there is no run file {path}")
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            problems.append(f"{path} is not TOML: {error}")

    @property
    def top_level(self) -> dict[str, Any]:
        """The hook references: keys of `[hooks]`, or above all tables."""
        return {**self._tables, **self._table("hooks")}

    def _table(self, name: str) -> dict[str, Any]:
        return self._tables[name] if isinstance(self._tables.get(name), dict) else {}

    def values(
        self, owners: Mapping[str, tuple[str, ...]], problems: list[str], foreign: Collection[str] = ()
    ) -> dict[str, Given]:
        """Return what the file sets; `owners` names the tables in which each option may stand.

        A key or table that belongs nowhere is a problem; in a table of `foreign` it is another program's, and returned
        with the table's name in front.
        """
        found: dict[str, Given] = {}
        groups = {table for tables in owners.values() for table in tables} | set(foreign)
        for table, key, value in self._settings(owners, groups, problems):
            where = f"{self.name} [{table}]" if table else self.name
            theirs = f"{table}_{key.replace('-', '_')}"
            if table in foreign and table not in owners.get(key, ()) and theirs not in owners:
                found[theirs] = Given(value, self.name, self.folder)
            elif key not in owners:
                problems.append(f"{where}: unknown key {key!r}{did_you_mean(key, owners)}")
            elif table is not None and table not in owners[key]:
                problems.append(f"{where}: {key} belongs in [{owners[key][0]}]")
            else:
                found[key] = Given(value, self.name, self.folder)
        return found

    def _settings(
        self, owners: Mapping[str, tuple[str, ...]], groups: set[str], problems: list[str]
    ) -> Iterator[tuple[str | None, str, Any]]:
        """Yield table (None above all tables), key and value of everything that is set."""
        hook_tables = {key: value for key, value in self._table("hooks").items() if isinstance(value, dict)}
        for name, value in self._tables.items():
            if not isinstance(value, dict) or name in owners:
                yield None, name, value
            elif name not in groups:
                near = did_you_mean(name, [group for group in groups if "." not in group])
                problems.append(f"{self.name}: unknown table [{name}]{near}")
            else:
                yield from ((name, key, value[key]) for key in value if name != "hooks" or key not in hook_tables)
        for hook, options in hook_tables.items():
            if f"hooks.{hook}" in groups:
                yield from ((f"hooks.{hook}", key, value) for key, value in options.items())
            else:
                problems.append(f"{self.name}: no configured hook takes options [hooks.{hook}]")
