"""The conformance kit: does a hook do what its stub promises? For tests of hook authors, and for ours.

`check_hook("reward", my_reward)` is all most tests need; installed with pytest, it is also a fixture of that name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_api.testing.check import check_hook
    from miles_api.testing.engine import Engine
    from miles_api.testing.options import hook_args
    from miles_api.testing.result import ConformanceError, ConformanceSkip, Report
    from miles_api.testing.samples import make_group, make_prompt, make_sample
    from miles_api.testing.state import MemorySource, State

__all__ = [
    "ConformanceError",
    "ConformanceSkip",
    "Engine",
    "MemorySource",
    "Report",
    "State",
    "check_hook",
    "hook_args",
    "make_group",
    "make_prompt",
    "make_sample",
]

_HOMES = {
    "case": ("case_of",),
    "check": ("check_bound", "check_hook", "users_part"),
    "engine": ("Engine",),
    "options": ("hook_args",),
    "result": ("ConformanceError", "ConformanceSkip", "Report"),
    "samples": ("make_group", "make_prompt", "make_sample"),
    "state": ("MemorySource", "State"),
}


def __getattr__(name: str) -> Any:
    # Every pytest session with miles-api installed imports this package for the plugin: it must cost nothing.
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
