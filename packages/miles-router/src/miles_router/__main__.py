"""`python -m miles_router`: the subcommand without the `miles` program."""

from __future__ import annotations

import argparse
import sys

from miles_api import stacks
from miles_api.errors import MilesError

from .command import command


def main() -> int:
    """Run the router; return the exit status."""
    stacks.register("router")
    parser = argparse.ArgumentParser(prog="python -m miles_router", description=command.help)
    command.configure(parser)
    try:
        return command.run(parser.parse_args())
    except MilesError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
