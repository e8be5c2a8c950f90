"""Options of other programs: taken from command line and file as they stand, for whoever asks that program."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.options import foreign_fields
from miles_api.parsing.flags import option_strings

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import msgspec

    from miles_api.parsing.given import Given

__all__ = ["foreign_values", "take_foreign"]


def take_foreign(argv: Sequence[str], groups: Mapping[str, type[msgspec.Struct]]) -> tuple[list[str], dict[str, Any]]:
    """Split off every `--GROUP-name [value …]` of another program; return the other words, and the values by option.

    How many values a flag takes only that program knows: it gets all words up to the next flag, but not a run file
    (`*.toml`), or exactly what follows `=`. None is true, one stands for itself, several are a list. The last counts of
    a flag that is given twice.
    """
    prefixes = tuple(f"--{table}-" for table in foreign_fields(groups))
    ours = {flag for kind in groups.values() for flag in option_strings(kind)}
    kept: list[str] = []
    found: dict[str, list[Any]] = {}
    values = kept
    for word in argv:
        flag, equals, value = word.partition("=")
        if prefixes and flag.startswith(prefixes) and flag not in ours:
            found[_name(flag)] = values = [_value(value)] if equals else []
            values = kept if equals else values
        elif values is not kept and not word.startswith("--") and not word.endswith(".toml"):
            values.append(_value(word))
        else:
            kept.append(word)
            values = kept
    return kept, {name: _plain(words) for name, words in found.items()}


def foreign_values(table: str, given: Mapping[str, Given], owners: Mapping[str, Any]) -> dict[str, Any]:
    """Return what was given for the program that the group `table` is named after, by its own names."""
    prefix = f"{table}_"
    return {
        name.removeprefix(prefix): item.value
        for name, item in given.items()
        if name.startswith(prefix) and name not in owners
    }


def _name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _plain(words: list[Any]) -> Any:
    return True if not words else words[0] if len(words) == 1 else words


def _value(word: str) -> Any:
    """Return a number where it is written as we would write it, so that it can become the same word again."""
    for kind in (int, float):
        try:
            number = kind(word)
        except ValueError:
            continue
        if str(number) == word and word not in ("nan", "inf", "-inf"):
            return number
    return word
