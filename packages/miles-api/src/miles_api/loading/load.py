"""From a reference to an object: `short_name`, `pkg.mod.fn`, `pkg.mod:fn` or `path/file.py:fn`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from pathlib import Path
from typing import Any

import msgspec

from miles_api.compat import translate
from miles_api.errors import HookLoadError, did_you_mean

__all__ = [
    "TRAINER_PACKAGES",
    "Found",
    "Origin",
    "entry_points",
    "find",
    "import_reference",
    "origin_of",
    "provider",
    "unwrapped",
]

TRAINER_PACKAGES = ("torch", "megatron", "transformer_engine", "miles_train")
"""What a hook of the trainer may import and a machine without trainer need not have."""

_USER_MODULE = "miles_user_"
"""How the modules of `path/file.py` references begin."""


class Origin(msgspec.Struct, frozen=True, kw_only=True):
    """Where a loaded object came from; written to `hooks.json` and compared between processes."""

    file: str
    sha256: str
    """Of the source file; empty for objects without one."""
    distribution: str
    version: str


class Found(msgspec.Struct, frozen=True):
    """What a reference names."""

    target: Any
    module: str
    """The name of the module that the reference names, which a value (a list of tools) cannot say itself."""
    distribution: tuple[str, str] | None = None
    """Name and version of the distribution that registered a short name."""


@functools.cache
def entry_points(group: str) -> dict[str, list[importlib.metadata.EntryPoint]]:
    """Return the installed entry points of a group by name; several distributions may offer the same name."""
    found: dict[str, list[importlib.metadata.EntryPoint]] = {}
    for point in importlib.metadata.entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def provider(group: str, name: str) -> Any:
    """Load the one object that `group` offers under `name`; none or two is a `HookLoadError` naming both sides."""
    return _point(group, name).load()


def _point(group: str, name: str) -> importlib.metadata.EntryPoint:
    points = entry_points(group).get(name, [])
    if len({point.value for point in points}) > 1:
        owners = " and ".join(f"{point.dist.name if point.dist else '?'} ({point.value})" for point in points)
        raise HookLoadError(f"{group} {name!r} is offered twice: by {owners}; uninstall one")
    if not points:
        known = sorted(entry_points(group))
        raise HookLoadError(
            f"no installed package offers {group} {name!r}{did_you_mean(name, known)} (installed: {known or 'none'})"
        )
    return points[0]


def import_reference(reference: str, *, short_names: str, flag: str) -> Any:
    """Import what `reference` names, as `find` does, and return the object alone."""
    return find(reference, short_names=short_names, flag=flag).target


def find(reference: str, *, short_names: str, flag: str) -> Found:
    """Import what `reference` names; `short_names` is the entry-point group searched for a bare name.

    Raises `HookLoadError` naming the flag, the reference and the nearest name; its `missing` says which other package
    the import lacked.
    """
    reference = translate(reference)
    try:
        return _find(reference, short_names)
    except HookLoadError as error:
        raise HookLoadError(f"{flag} {reference}: {error}", missing=error.missing) from error
    except (Exception, SystemExit) as error:  # a script exits when it is imported
        raise HookLoadError(
            f"{flag} {reference} does not import: {_told(error)}{_file_here(error, reference)}",
            missing=_missing(error, reference, short_names),
        ) from error


def _find(reference: str, short_names: str) -> Found:
    if not any(mark in reference for mark in (".", ":", "/")):
        point = _point(short_names, reference)
        dist = point.dist
        return Found(point.load(), point.module, (dist.name, dist.version) if dist else None)
    module_name, _, attribute = reference.rpartition(":")
    if not module_name:
        if reference.endswith(".py"):
            raise HookLoadError(f"name the function in the file: {reference}:function")
        module_name, _, attribute = reference.rpartition(".")
    module = _import_file(module_name) if module_name.endswith(".py") else importlib.import_module(module_name)
    return Found(_attribute(module, attribute), module.__name__)


def _told(error: BaseException) -> str:
    """Say what an import raised; of a `SyntaxError` its place, line and caret, of an `ImportError` the import."""
    if isinstance(error, SyntaxError):
        place = "".join(traceback.format_exception_only(error)[:-1]).rstrip()
        return f"{type(error).__name__}: {error.msg}" + (f"\n{place}" if place else "")
    text = f"{type(error).__name__}: {error}"
    if not isinstance(error, ImportError):
        return text
    machinery = str(Path(importlib.__file__).parent)
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<frozen importlib", machinery)) and frame.filename != __file__
    ]
    return text + "".join(f"\n  {frame.filename}, line {frame.lineno}: {frame.line}" for frame in frames[-1:])


def _file_here(error: BaseException, reference: str) -> str:
    """Return a hint where the module that was not found lies in the current directory as a file."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return ""
    module, _, attribute = reference.rpartition(":" if ":" in reference else ".")
    file = Path(*module.split(".")).with_suffix(".py")
    if f"{module}.".startswith(f"{error.name}.") and file.is_file():
        return f"; did you mean the file {file.as_posix()}:{attribute}?"
    return ""


def _missing(error: BaseException, reference: str, short_names: str) -> str | None:
    """Return the top-level module that an import lacked, unless it is the one that the reference itself names."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    named = _point(short_names, reference).module if reference in entry_points(short_names) else reference
    lacked = error.name.partition(".")[0]
    own = "" if ".py:" in named else named.partition(":")[0].partition(".")[0]
    return None if lacked == own else lacked


def _attribute(module: Any, dotted: str) -> Any:
    found = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            names = [name for name in dir(found) if not name.startswith("_")]
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
    name = f"{_USER_MODULE}{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
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


def unwrapped(target: Any) -> Any:
    """Return the function behind `functools.partial`, which says neither where it is from nor its ABI."""
    while isinstance(target, functools.partial):
        target = target.func
    return target


def origin_of(found: Found) -> Origin:
    """Say which file and distribution a loaded object comes from."""
    target = unwrapped(found.target)
    own = getattr(target, "__module__", None) or found.module or type(target).__module__
    file = getattr(sys.modules.get(own), "__file__", None) or ""
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file and Path(file).is_file() else ""
    package = own.partition(".")[0]
    # Several distributions may share a namespace package: the one that registered the short name knows better.
    registered = found.distribution if package == found.module.partition(".")[0] else None
    name, version = registered or _distribution(package)
    return Origin(file=file, sha256=digest, distribution=name, version=version)


@functools.cache
def _distribution(package: str) -> tuple[str, str]:
    """Return name and version of the distribution that holds a top-level package, or two empty strings."""
    if package.startswith(_USER_MODULE):
        return "", ""
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
