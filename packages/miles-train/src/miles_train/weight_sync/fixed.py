"""Weights that stay as the engines loaded them: runs that train nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_train.weight_sync.engine import ask

if TYPE_CHECKING:
    from miles_api.errors import MilesError
    from miles_api.services import Endpoint

__all__ = ["FixedWeights"]


class FixedWeights:
    """Pushes nothing, and knows by which version the engines call what they loaded."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        """Ask every engine for its version; raises `ServiceError` if they differ."""
        versions = {endpoint.url: _version_of(endpoint) for endpoint in endpoints}
        if len(set(versions.values())) > 1:
            raise ServiceError(f"the engines serve different weights: {versions}")
        self._version = next(iter(versions.values()))

    def push(self, version: int) -> dict[str, float]:  # noqa: ARG002  they stay as they are
        """Do nothing."""
        return {}

    def served(self, version: int) -> str:  # noqa: ARG002  the trainer's count means nothing here
        """Return the version of what the engines loaded; empty where they name none."""
        return self._version

    def replace(self, old: Endpoint, new: Endpoint) -> None:
        """Do nothing: nothing is pushed."""

    def bring(self, endpoint: Endpoint) -> None:
        """Let a new engine serve what it loaded; until then it holds its requests. Raises `ServiceError`."""
        served = _version_of(endpoint)
        if served != self._version:
            raise ServiceError(f"the new engine {endpoint.url} serves weights {served!r}, not {self._version!r}")
        ask(endpoint, "/continue_generation", {})

    def awaiting(self) -> int:
        """Return 0: nobody waits for a push."""
        return 0

    def give_up(self, error: MilesError) -> None:
        """Do nothing: no push waits."""

    def close(self) -> None:
        """Do nothing."""


def _version_of(endpoint: Endpoint) -> str:
    version = ask(endpoint, "/model_info").get("weight_version")
    return "" if version is None else str(version)
