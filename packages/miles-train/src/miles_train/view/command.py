"""The `miles report` subcommand."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

__all__ = ["ReportCommand", "command"]


class ReportCommand:
    """Write a run's report once more."""

    help = "write report.html of a run directory, also of a run that failed or still goes on"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments to `parser`."""
        parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="the run directory")

    def run(self, namespace: argparse.Namespace) -> int:
        """Write the report and print its path. Raises `DataError` if there is no such run."""
        # `miles --help` loads every command: what this one needs is loaded when it is called.
        report = importlib.import_module("miles_train.view.report")
        print(report.write_report(namespace.run_dir))
        return 0


command = ReportCommand()
