"""The parser of a command's words: what it does not know is named with the usage of the very action."""

from __future__ import annotations

import argparse
import re
from typing import TYPE_CHECKING, Any, NoReturn

from miles_api.errors import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["CommandParser"]

_CHOICE = re.compile(r"invalid choice: '([^']*)' \(choose from (.*)\)")


class CommandParser(argparse.ArgumentParser):
    """Refuse unknown words where they stand: argparse leaves those of an action to the parser above it."""

    _words: Sequence[str] = ()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but leave no word over."""
        self._words = args or ()
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(self._unknown(rest) or f"unexpected {rest[0]!r}")
        return found, rest

    def error(self, message: str) -> NoReturn:
        """Exit with 2; a misspelt flag comes before what is missing because of it, and a wrong choice gets a hint."""
        choice = _CHOICE.search(message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w.-]+", choice[2]))
        elif "arguments are required" in message:
            message = self._unknown(self._words) or message
        super().error(message)

    def _unknown(self, words: Sequence[str]) -> str:
        """Name the flags among `words` that are not of this parser."""
        known = list(self._option_string_actions)
        flags = [word.partition("=")[0] for word in words if word.startswith("--") and word != "--"]
        wrong = [flag for flag in flags if not any(name.startswith(flag) for name in known)]
        return "; ".join(f"unknown flag {flag}{did_you_mean(flag, known)}" for flag in wrong)
