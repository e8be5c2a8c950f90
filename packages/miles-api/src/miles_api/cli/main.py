"""`miles COMMAND …`: commands are found by entry points, and only the one that is called is imported.

A command is an object offered under `miles.commands` with `help` and either `main(argv) -> int`, or
`configure(parser)` and `run(namespace) -> int`.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from miles_api._version import __version__
from miles_api.cli.command_parser import CommandParser
from miles_api.errors import MilesError, did_you_mean
from miles_api.loading.load import entry_points

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["main"]

USAGE_ERROR = 2
INTERRUPTED = 130
_UNREAD = 1
_ELSEWHERE = {
    "train": "miles-train", "report": "miles-train", "router": "miles-router", "sglang-cpu": "miles-rollout",
    "retrieval-server": "miles-hooks-contrib",
}  # fmt: skip
"""The commands of other packages."""
_INSTALL = {"miles-train": "miles-train[full]"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed while running, 2 refused before it started.

    A reader of the output that stops early (`| head`) ends the command with 1, without a traceback.
    """
    try:
        try:
            return _main(list(sys.argv[1:] if argv is None else argv))
        finally:
            # What is still buffered would break the pipe at exit, where nothing can be said about it.
            sys.stdout.flush()
    except BrokenPipeError:
        if not _stdout_is_broken():
            raise
        # Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _UNREAD


def _stdout_is_broken() -> bool:
    """Say whether nobody reads the output any more: a socket that breaks in a command raises the same."""
    try:
        print(flush=True)
    except BrokenPipeError:
        return True
    return False


def _main(words: list[str]) -> int:
    commands = entry_points("miles.commands")
    if not words or words[0] in ("-h", "--help"):
        print(_overview(sorted(commands)))
        return 0 if words else USAGE_ERROR
    if words[0] in ("-V", "--version"):
        print(f"miles-api {__version__}")
        return 0
    name, rest = words[0], words[1:]
    if name not in commands:
        print(f"miles: {_no_command(name, commands)}", file=sys.stderr)
        return USAGE_ERROR
    try:
        return _run(name, rest)
    except MilesError as error:
        print(f"miles {name}: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _no_command(name: str, commands: Iterable[str]) -> str:
    if name in _ELSEWHERE:
        package = _ELSEWHERE[name]
        return f"the command {name!r} needs {package} (pip install {_INSTALL.get(package, package)})"
    return f"there is no command {name!r}{did_you_mean(name, [*commands, *_ELSEWHERE])}"


def _run(name: str, rest: list[str]) -> int:
    command = entry_points("miles.commands")[name][0].load()
    if hasattr(command, "main"):
        return int(command.main(rest))
    parser = CommandParser(prog=f"miles {name}", description=command.help)
    command.configure(parser)
    return int(command.run(parser.parse_args(rest)))


def _overview(names: list[str]) -> str:
    lines = ["usage: miles COMMAND …", "", "commands:"]
    wide = max(map(len, names), default=0)
    lines += [f"  {name:{wide}}  {entry_points('miles.commands')[name][0].load().help}" for name in names]
    codes = "exit codes: 0 done, 1 failed while running, 2 refused before it started"
    return "\n".join([*lines, "", codes, "`miles COMMAND --help` says more."])
