"""`miles COMMAND …`: commands are found by entry points, and only the one that is called is imported.

A command is an object offered under `miles.commands` with `help` and either `main(argv) -> int`, or
`configure(parser)` and `run(namespace) -> int`.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from miles_api._version import __version__
from miles_api.errors import MilesError, did_you_mean
from miles_api.loading.load import entry_points

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

USAGE_ERROR = 2
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed while running, 2 refused before it started."""
    words = list(sys.argv[1:] if argv is None else argv)
    commands = entry_points("miles.commands")
    if not words or words[0] in ("-h", "--help"):
        print(_overview(sorted(commands)))
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version"):
        print(f"miles-api {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in commands:
        print(f"miles: there is no command {name!r}{did_you_mean(name, commands)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return _run(name, rest)
    except MilesError as error:
        print(f"miles {name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _run(name: str, rest: list[str]) -> int:
    command = entry_points("miles.commands")[name][0].load()
    if hasattr(command, "main"):
        return int(command.main(rest))
    parser = argparse.ArgumentParser(prog=f"miles {name}", description=command.help)
    command.configure(parser)
    return int(command.run(parser.parse_args(rest)))


def _overview(names: list[str]) -> str:
    lines = ["usage: miles COMMAND …", "", "commands:"]
    lines += [f"  {name:10} {entry_points('miles.commands')[name][0].load().help}" for name in names]
    codes = "exit codes: 0 done, 1 failed while running, 2 refused before it started"
    return "\n".join([*lines, "", codes, "`miles COMMAND --help` says more."])
