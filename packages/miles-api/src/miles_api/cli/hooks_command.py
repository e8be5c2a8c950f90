"""`miles hooks list | show | new | check | run`: the hook table, and what the author of one needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.cli.hooks import check_action, list_action, new_action, run_action, show_action

if TYPE_CHECKING:
    import argparse

__all__ = ["ACTIONS", "command"]

ACTIONS = (list_action, show_action, new_action, check_action, run_action)


class _HooksCommand:
    help = "list and show hooks, begin one, check one, run one on recorded samples"

    def configure(self, parser: argparse.ArgumentParser) -> None:
        actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
        for action in ACTIONS:
            action.configure(actions.add_parser(action.NAME, help=action.HELP, description=action.HELP))

    def run(self, options: argparse.Namespace) -> int:
        return next(action for action in ACTIONS if options.action == action.NAME).run(options)


command = _HooksCommand()
