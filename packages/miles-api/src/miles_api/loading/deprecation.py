"""Warn about a configured hook, or an argument it takes, that the next major ABI will not have."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from miles_api.errors import MilesDeprecationWarning

if TYPE_CHECKING:
    from miles_api.loading.fit import Fit
    from miles_api.spec import HookSpec

__all__ = ["warn_of_deprecations"]


def warn_of_deprecations(spec: HookSpec, reference: str, how: Fit) -> None:
    """Emit one `MilesDeprecationWarning` for the hook, or one for each deprecated argument that it names."""
    what = f"{spec.flag or spec.name} {reference}"
    if spec.deprecated is not None:
        _warn(f"{what}: the {spec.name} hook is deprecated {spec.deprecated}")
        return
    for argument in sorted(how.named & spec.deprecated_arguments.keys()):
        _warn(f"{what} takes {argument!r}, which is deprecated {spec.deprecated_arguments[argument]}")


def _warn(text: str) -> None:
    # The place is always ours, so that Python's own filter shows each text once a process.
    warnings.warn(text, MilesDeprecationWarning, stacklevel=1)
