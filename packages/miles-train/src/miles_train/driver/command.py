"""`miles train [RUN.toml] [--flag value …]`: check, show the plan, start, train, report."""

from __future__ import annotations

import importlib

from miles_api.checks.check import CheckReport, check_words
from miles_api.checks.plan import plan_lines
from miles_api.checks.run_checks import services_of
from miles_api.cli.run_help import print_run_help
from miles_api.errors import ConfigError
from miles_api.loading.load import entry_points
from miles_api.run_options import RunOptions

__all__ = ["command"]

_EPILOG = (
    "exit codes: 0 trained, 1 failed while running, 2 refused before anything started, 130 and 143 interrupted by "
    "SIGINT (Ctrl-C) and SIGTERM"
)


class _TrainCommand:
    help = "run a training described by a TOML file and flags"

    def main(self, argv: list[str]) -> int:
        """Return 0 when trained, 1 when the run failed, 130 or 143 when SIGINT or SIGTERM ended it.

        Raises `ConfigError` for what is refused before it starts.
        """
        if any(word in ("-h", "--help") for word in argv):
            print_run_help("miles train", self.help, epilog=_EPILOG)
            return 0
        report = check_words(argv, prog="miles train")
        _require(report)
        for line in plan_lines(report):
            print(line, flush=True)
        # Ray and the rest are loaded when all that can be checked without them is right.
        return importlib.import_module("miles_train.driver.run").train(report)


def _require(report: CheckReport) -> None:
    """Raise `ConfigError` with every problem; a service that this run needs and nothing installed offers is one."""
    texts = [problem.message for problem in report.problems]
    if report.config is not None:
        # Not loaded here: the trainer's brings torch and Megatron along.
        offered = entry_points("miles.services")
        wanted = services_of(report.config.group(RunOptions))
        texts += [f"no installed package offers the {name} service" for name in wanted if name not in offered]
    if texts:
        raise ConfigError("\n".join(texts))


command = _TrainCommand()
