"""Which ABI a hook was written for, and whether this build speaks it."""

from __future__ import annotations

import importlib.metadata
import re
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api import abi
from miles_api._version import __version__
from miles_api.abi import ABI_OF_RELEASE, Version, shown
from miles_api.errors import HookVersionError

if TYPE_CHECKING:
    from miles_api.spec import HookSpec

__all__ = ["HookAbi", "abi_of", "abi_of_requirement", "newer_keywords", "require_compatible"]

_REQUIREMENT = re.compile(r"\s*miles[-_.]api\s*(?:\[[^\]]*\])?\s*\(?(?P<versions>[^;)@]*)", re.IGNORECASE)
_LOWER_BOUND = re.compile(r"\s*(?:~=|===?|>=?)\s*v?(\d+)(?:\.(\d+))?")


class HookAbi(msgspec.Struct, frozen=True):
    """The ABI that a hook was written for, and who says so."""

    version: Version
    said_by: str

    def __str__(self) -> str:
        return f"ABI {shown(self.version)} ({self.said_by})"


def abi_of(target: Any, distribution: str) -> HookAbi:
    """Read a hook's ABI: its `__miles_abi__`, else its distribution's requirement on miles-api, else the current one.

    Raises `HookVersionError` for a `__miles_abi__` that is not `(major, minor)`.
    """
    said = getattr(target, "__miles_abi__", None)
    if said is not None:
        if not (isinstance(said, tuple) and len(said) == 2 and all(type(part) is int for part in said)):  # noqa: PLR2004
            raise HookVersionError(f"its __miles_abi__ is {said!r}, not (major, minor)")
        return HookAbi(said, "its __miles_abi__")
    for requirement in _requirements(distribution):
        version = abi_of_requirement(requirement)
        if version is not None:
            return HookAbi(version, f"{distribution} requires {requirement.partition(';')[0].strip()}")
    return HookAbi(abi.ABI, "the current one, as nothing says otherwise")


def abi_of_requirement(requirement: str) -> Version | None:
    """Return the ABI that the lower bound of a requirement on miles-api means; None if it has none, or an `extra`.

    `ABI_OF_RELEASE` translates the bound's major and minor. A release after its last line is one that this build has
    not heard of: it is taken to ship an ABI of its own number, which is newer than ours and so refused.
    """
    found = _REQUIREMENT.match(requirement)
    if found is None or "extra" in requirement.partition(";")[2]:
        return None
    bounds = [_LOWER_BOUND.match(part) for part in found["versions"].split(",")]
    series = [(int(bound[1]), int(bound[2] or 0)) for bound in bounds if bound]
    if not series:
        return None
    wanted = max(series)
    if wanted > max(ABI_OF_RELEASE):
        return wanted
    lines = [release for release in ABI_OF_RELEASE if release <= wanted]
    return ABI_OF_RELEASE[max(lines, default=min(ABI_OF_RELEASE))]


def require_compatible(spec: HookSpec, reference: str, theirs: HookAbi) -> None:
    """Refuse a hook of another major or of a newer minor: `HookVersionError` names both versions."""
    ours = abi.ABI
    if theirs.version[0] == ours[0] and theirs.version[1] <= ours[1]:
        return
    remedy = "a newer miles-api" if theirs.version > ours else "a newer version of the hook"
    raise HookVersionError(
        f"{spec.flag or spec.name} {reference} was written for {theirs}, "
        f"but this is ABI {shown(ours)} (miles-api {__version__}); install {remedy}"
    )


def newer_keywords(spec: HookSpec, theirs: HookAbi) -> frozenset[str]:
    """Return the keywords that came after the hook: a parameter of its own may have the same name by chance."""
    return frozenset(name for name, since in spec.added.items() if since > theirs.version)


def _requirements(distribution: str) -> list[str]:
    if not distribution:
        return []
    try:
        return importlib.metadata.requires(distribution) or []
    except importlib.metadata.PackageNotFoundError:
        return []
