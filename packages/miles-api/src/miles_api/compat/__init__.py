"""Hooks written for Miles 0.x and slime, loaded unmodified: their imports, flag values and signatures.

Imports of `miles.*` and `slime.*` are served from one table (`compat.table`) by a finder that is installed with the
first hook reference of the process and asked last, so a really installed `miles` or `slime` wins.
"""

from __future__ import annotations

import importlib.util

from miles_api.compat.adapters import adapt
from miles_api.compat.finder import install, stands_in_for
from miles_api.compat.table import EXAMPLES, FLAG_VALUES, ROOTS, row_of

__all__ = ["adapt", "translate"]


def translate(reference: str) -> str:
    """Return our reference for an old default path, other references as they are.

    Called before a reference is imported; from then on imports of `miles.*` and `slime.*` work in this process.
    """
    if not any(mark in reference for mark in (".", ":", "/")):
        return reference
    install()
    dotted = reference.replace(":", ".")
    if dotted in EXAMPLES:
        return reference if _is_importable(dotted.rpartition(".")[0]) else EXAMPLES[dotted]
    root, _, name = dotted.partition(".")
    if root not in ROOTS or "/" in reference or not stands_in_for(root):
        return reference
    return FLAG_VALUES.get(name) or row_of(root, name) or reference


def _is_importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False
