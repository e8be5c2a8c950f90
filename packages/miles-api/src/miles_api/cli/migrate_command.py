"""`miles migrate launch.sh [-o run.toml]`: a launch script of Miles 0.x or slime as a run file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from miles_api.errors import ConfigError
from miles_api.migrate import Migration, migrate, read_script, to_toml

if TYPE_CHECKING:
    from miles_api.migrate.translate import Left

__all__ = ["command"]

_OK, _LACKING = 0, 1
_STDOUT = "-"
_EPILOG = """\
The script is read and never run: conditions are decided as with an empty environment. Every flag of its train.py is
taken over, named as not needed, or named with what it lacks here; the run file has the same list in comments.

exit codes:
  0  written
  1  written, and with --strict: some flags have no counterpart, or values that do not fit, or are of packages not
     installed here
  2  refused: the script cannot be read, or the file is there already"""


class _MigrateCommand:
    help = "turn a launch script of Miles 0.x or slime into a run file"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _EPILOG
        parser.add_argument("script", metavar="SCRIPT", help="shell script, or a list of arguments; - is stdin")
        parser.add_argument("-o", "--output", metavar="FILE", default="run.toml", help="default: run.toml; - is stdout")
        parser.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
        parser.add_argument("--strict", action="store_true", help="exit with 1 if a flag has no counterpart")

    def run(self, options: argparse.Namespace) -> int:
        """Read, write and say what is missing."""
        script = read_script(options.script)
        output = Path(options.output)
        if options.output != _STDOUT and output.exists() and not options.overwrite:
            raise ConfigError(f"{output} is there already: pass --overwrite, or another -o")
        migration = migrate(script)
        text = to_toml(migration)
        for line in _report(migration):
            print(line, file=sys.stderr)
        if options.output == _STDOUT:
            print(text, end="")
        else:
            _write(output, text)
            print(f"wrote {output}; next: miles check {output}")
        left = migration.lacking or migration.unfit or migration.unplaced
        return _LACKING if options.strict and left else _OK


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error


def _report(migration: Migration) -> list[str]:
    lines = [f"warning: {migration.warning}"] if migration.warning else []
    lines += [f"{migration.script}: {migration.summary}"]
    lines += _named("without counterpart:", migration.lacking)
    lines += _named("values that do not fit:", migration.unfit)
    doubts = [f"  {entry.place}: {entry.key}: {entry.doubt}" for entry in migration.entries if entry.doubt]
    lines += ["to be looked at:", *doubts] if doubts else []
    return lines + (["notes:", *(f"  {note}" for note in migration.notes)] if migration.notes else [])


def _named(title: str, left: list[Left]) -> list[str]:
    return [title, *(f"  {one.place}: {one.flag}: {one.reason}" for one in left)] if left else []


command = _MigrateCommand()
