"""From a reference to an object: `short_name`, `pkg.mod.fn`, `pkg.mod:fn` or `path/file.py:fn`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from typing import Any

import msgspec

from miles_api.compat import translate
from miles_api.errors import HookLoadError, did_you_mean

__all__ = ["Origin", "entry_points", "import_reference", "origin_of", "provider"]


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a loaded object came from; written to `hooks.json` and compared between processes."""

    file: str
    sha256: str
    """Of the source file; empty for objects without one."""
    distribution: str
    version: str


@functools.cache
def entry_points(group: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return the installed entry points of a group by name; several distributions may offer the same name."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def provider(group: str, name: str) -> Any:
    """Load the one object that `group` offers under `name`; none or two is a `HookLoadError` naming both sides."""
    points = entry_points(group).get(name, [])
    if len({point.value for point in points}) > 1:
        owners = " and ".join(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points)
        raise HookLoadError(f"{group} {name!r} is offered twice: by {owners}; uninstall one")
    if not points:
        known = sorted(entry_points(group))
        raise HookLoadError(
            f"no installed package offers {group} {name!r}{did_you_mean(name, known)} (installed: {known or 'none'})"
        )
    return points[0].load()


def import_reference(reference: str, *, short_names: str, flag: str) -> Any:
    """Import what `reference` names; `short_names` is the entry-point group searched for a bare name.

    Raises `HookLoadError` naming the flag, the reference and the nearest name.
    """
    reference = translate(reference)
    try:
        if not any(mark in reference for mark in (".", ":", "/")):
            return provider(short_names, reference)
        module_name, _, attribute = reference.rpartition(":")
        if not module_name:
            if reference.endswith(".py"):
                raise HookLoadError(f"name the function in the file: {reference}:function")
            module_name, _, attribute = reference.rpartition(".")
        module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
        return _attribute(module, attribute)
    except HookLoadError as error:
        raise HookLoadError(f"{flag} {reference}: {error}") from error
    except Exception as error:
        raise HookLoadError(f"{flag} {reference} does not import: {type(error).__name__}: {error}") from error


def _attribute(module: Any, dotted: str) -> Any:
    found = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            names = [name for name in vars(found) if not name.startswith("_")]
            where = getattr(module, "__file__", None) or module.__name__
            raise HookLoadError(f"{where} has no {part!r}{did_you_mean(part, names)}")
        found = getattr(found, part)
    return found


@functools.cache
def _import_file(path: str) -> Any:
    file = Path(path).expanduser().resolve()
    if not file.is_file():
        near = did_you_mean(file.name, [p.name for p in file.parent.glob("*.py")]) if file.parent.is_dir() else ""
        raise HookLoadError(f"there is no file {file}{near}")
    name = f"miles_user_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise HookLoadError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Registered before it runs, so that pickling its classes and dataclasses works; its folder comes last on the path
    # so that a file beside the hook can be imported without shadowing an installed package.
    sys.modules[name] = module
    if str(file.parent) not in sys.path:
        sys.path.append(str(file.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def origin_of(found: Any) -> Origin:
    """Say which file and distribution an object comes from."""
    module = sys.modules.get(getattr(found, "__module__", None) or type(found).__module__)
    file = getattr(module, "__file__", None) or ""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
    name, version = _distribution((module.__name__ if module else "").partition(".")[0])
    return Origin(file=file, sha256=digest, distribution=name, version=version)


@functools.cache
def _distribution(package: str) -> tuple[str, str]:
    """Return name and version of the distribution that holds a top-level package, or two empty strings."""
    # An editable install lists no files: there the distribution is looked up by the package's own name.
    for name in [*_packages_to_distributions().get(package, []), package.replace("_", "-")]:
        try:
            return name, importlib.metadata.version(name)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return "", ""


@functools.cache
def _packages_to_distributions() -> dict[str, list[str]]:
    return dict(importlib.metadata.packages_distributions())
