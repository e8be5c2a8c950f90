"""Serve imports of `miles.*` and `slime.*` from the table, where neither is really installed."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from typing import TYPE_CHECKING, Any

from miles_api.compat.table import ROOTS, ROWS, modules_of, nearest, row_of

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["install", "stands_in_for"]


class _Module(types.ModuleType):
    """A module of the old package; a name is looked up in the table when it is first used."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        dotted = f"{self.__name__}.{name}"
        root, _, below = dotted.partition(".")
        if dotted in modules_of(root):
            return importlib.import_module(dotted)
        target = row_of(root, below)
        if target is None:
            raise AttributeError(_unknown(dotted))
        module, _, attribute = target.partition(":")
        found = getattr(importlib.import_module(module), attribute)
        setattr(self, name, found)
        return found

    def __dir__(self) -> list[str]:
        root, _, prefix = self.__name__.partition(".")
        start = f"{prefix}." if prefix else ""
        below = [name.removeprefix(start).partition(".")[0] for name in ROWS[root] if name.startswith(start)]
        return sorted({*super().__dir__(), *below})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Find modules of the table; refuse others below the old packages with the nearest name."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002
        target: Any = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        root = fullname.partition(".")[0]
        if root not in ROOTS or _is_real(root):
            return None
        if fullname not in modules_of(root):
            # Without `name=`: the import system swallows the error of `from package import name` otherwise.
            raise ModuleNotFoundError(_unknown(fullname))
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Module(spec.name, "A name of an older stack; see docs/compat.md.")

    def exec_module(self, module: types.ModuleType) -> None:
        """Fill nothing in: names are looked up one by one."""


_FINDER = _Finder()


def install() -> None:
    """Serve imports of the old packages from now on, after every other finder; again does nothing."""
    if _FINDER not in sys.meta_path:
        sys.meta_path.append(_FINDER)


def stands_in_for(root: str) -> bool:
    """Say whether `root` is served from the table: not where a package of that name is installed."""
    if root in sys.modules:
        return not _is_real(root)
    spec = importlib.util.find_spec(root)
    # A folder of that name without `__init__.py` has no origin: it is data, or a checkout's parent.
    return spec is None or spec.origin is None


def _is_real(root: str) -> bool:
    return getattr(sys.modules.get(root), "__file__", None) is not None


def _unknown(dotted: str) -> str:
    return f"Miles has no {dotted!r} for hooks of older stacks; the nearest it has is {nearest(dotted)!r}"
