"""The help of commands that take a run: every option, below a usage line that fits on a screen."""

from __future__ import annotations

import argparse

from miles_api.config import option_groups
from miles_api.parsing.parse import add_option_flags

__all__ = ["print_run_help"]


def print_run_help(prog: str, description: str, *, usage: str = "", epilog: str = "") -> None:
    """Print the help of `prog`; `usage` names what it takes besides a run."""
    parser = argparse.ArgumentParser(
        prog=prog,
        usage=f"{prog} [RUN.toml] {usage}[--flag value …]",
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", nargs="?", metavar="RUN.toml", help="TOML file that describes the run")
    add_option_flags(parser, option_groups())
    parser.print_help()
