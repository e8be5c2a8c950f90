"""`python -m miles_router`: the subcommand without the `miles` program."""

from __future__ import annotations

import sys

from miles_api import stacks
from miles_api.errors import MilesError

from .command import command


def main() -> int:
    """Run the router; return the exit status."""
    stacks.register("router")
    try:
        return command.main(sys.argv[1:], prog="python -m miles_router")
    except MilesError as exc:
        print(f"{type(exc).__name__}: {exc}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
