"""How the checks of each hook are declared: `@case("reward")`, one file a stage."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import msgspec

__all__ = ["CASES", "Case", "case", "case_of"]

CheckFunction = Callable[[Any], None]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """The checks of one hook."""

    run: CheckFunction
    """Calls the hook through a `Trial`, which notes what passed and raises what did not."""
    acts: bool
    """True for a hook that may touch the world outside (files, services, tools) or needs more than we can make up:
    `miles hooks check` calls it only when asked to."""
    left_out: str
    """What the checks cannot see, in words."""


CASES: dict[str, Case] = {}
"""By hook; filled as the stages are imported."""


def case(name: str, *, acts: bool = False, left_out: str = "") -> Callable[[CheckFunction], CheckFunction]:
    """Declare the checks of the hook `name`."""

    def declare(run: CheckFunction) -> CheckFunction:
        CASES[name] = Case(run=run, acts=acts, left_out=left_out)
        return run

    return declare


def case_of(name: str, stage: str) -> Case:
    """Return the checks of one hook; imports those of its stage alone."""
    import_module(f"miles_api.testing.cases.{stage}")
    return CASES[name]
