"""Hooks without a flag: a function of a fixed name in the module of another hook."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from miles_api.hooks import REGISTRY
from miles_api.loading.bind import BoundHook, bind
from miles_api.loading.load import unwrapped

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["BESIDE", "beside"]

BESIDE = {"agent_abort": ("agent", "abort")}
"""By hook: which hook it stands beside, and under which name."""


def beside(name: str, owner: BoundHook, view: Args | None = None) -> BoundHook | None:
    """Return the hook `name` from the module in which `owner` is defined, or None where there is no such function.

    A name that the module only imports is not meant. Raises a `HookError` for one that does not fit the stub.
    """
    module = sys.modules.get(unwrapped(owner.target).__module__)
    attribute = BESIDE[name][1]
    found = getattr(module, attribute, None)
    if module is None or getattr(found, "__module__", None) != module.__name__:
        return None
    if not any(mark in owner.reference for mark in (".", ":")):  # a short name
        place = f"{module.__name__}:"
    else:
        mark = ":" if ":" in owner.reference else "."
        place = owner.reference.rpartition(mark)[0] + mark
    return bind(REGISTRY[name], place + attribute, found, view)
