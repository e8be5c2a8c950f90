"""What can become of a flag, and the ways in which the table says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["Drop", "Flag", "Flags", "Lack", "Rule", "Take", "Unplaced", "drop", "lack", "only", "renamed", "with_value"]


class Flag(msgspec.Struct):
    """One flag of the script."""

    name: str
    """With its dashes."""
    values: list[str]
    place: str
    unknown: tuple[str, ...] = ()
    """Variables of the environment and outputs of commands in its values."""

    @property
    def number(self) -> float | None:
        """Its only value as a number."""
        try:
            return float(self.values[0]) if len(self.values) == 1 else None
        except ValueError:
            return None


Flags = dict[str, Flag]
"""All flags of the script by name; where one stands twice the last counts, as for argparse."""


class Take(msgspec.Struct):
    """It becomes an option."""

    key: str
    values: Any
    """Words, as on a command line; or the value itself."""
    remark: str = ""
    """Why it reads otherwise than in the script."""
    doubt: str = ""
    """What its author has to look at before the run starts."""


class Drop(msgspec.Struct):
    """Nothing is needed for it."""

    reason: str


class Lack(msgspec.Struct):
    """It changes what the run does and has no counterpart."""

    reason: str


class Unplaced(msgspec.Struct):
    """It may be an option of a package that is not installed."""

    reason: str


Verdict = Take | Drop | Lack | Unplaced
Rule = Callable[[Flag, Flags], Verdict]


def drop(reason: str, *names: str) -> dict[str, Rule]:
    """Say why nothing is needed for these flags."""
    return {name: lambda _flag, _flags: Drop(reason) for name in names}


def lack(reason: str, *names: str) -> dict[str, Rule]:
    """Say what is not there, and what to do instead."""
    return {name: lambda _flag, _flags: Lack(reason) for name in names}


def only(value: str | float, fine: str, otherwise: str, *names: str) -> dict[str, Rule]:
    """Say of these flags that one value is what happens here anyway, and that others have no counterpart."""

    def rule(flag: Flag, _flags: Flags) -> Verdict:
        same = flag.number == value if isinstance(value, int | float) else flag.values == [value]
        return Drop(fine) if same else Lack(otherwise)

    return dict.fromkeys(names, rule)


def renamed(key: str, remark: str, *names: str) -> dict[str, Rule]:
    """Take the value over under another name."""
    return {name: lambda flag, _flags: Take(key, flag.values, remark) for name in names}


def with_value(key: str, value: Any, remark: str, *names: str) -> dict[str, Rule]:
    """Turn a switch into an option's value."""
    return {name: lambda _flag, _flags: Take(key, value, remark) for name in names}
