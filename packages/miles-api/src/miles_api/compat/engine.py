"""Old names whose objects need an engine package: looked up in the entry-point group `miles.compat` when used."""

from __future__ import annotations

from typing import Any

from miles_api.errors import HookLoadError
from miles_api.loading.load import provider

__all__: list[str] = []


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return provider("miles.compat", name)
    except HookLoadError as error:
        raise ImportError(f"an older name needs an engine package: {error}") from error
