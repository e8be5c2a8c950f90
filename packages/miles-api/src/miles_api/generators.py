"""The random generators that all code of a process shares, Python's and NumPy's: seeded, saved and restored."""

from __future__ import annotations

import contextlib
import importlib
import random
import sys
from typing import Any

__all__ = ["restore", "seed", "states"]


def seed(number: int) -> None:
    """Seed the generators: what hooks draw then depends on the order of their calls alone."""
    random.seed(number)
    # Also where no hook has imported it yet: one that does so when it is called would draw from fresh entropy.
    with contextlib.suppress(ModuleNotFoundError):
        importlib.import_module("numpy").random.seed(number % 2**32)


def states() -> dict[str, Any]:
    """Return the states of the generators, of NumPy's where it is loaded; plain values, for a checkpoint."""
    found: dict[str, Any] = {"python": random.getstate()}
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, *rest = numpy.random.get_state()
        found["numpy"] = [name, keys.tolist(), *rest]
    return found


def restore(found: dict[str, Any]) -> None:
    """Set the generators to what `states` returned."""
    version, keys, gauss = found["python"]
    random.setstate((version, tuple(keys), gauss))
    if "numpy" in found:
        importlib.import_module("numpy").random.set_state(tuple(found["numpy"]))
