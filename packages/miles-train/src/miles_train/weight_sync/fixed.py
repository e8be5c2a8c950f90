"""Weights that stay as the engines loaded them: runs that train nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import ServiceError
from miles_train.weight_sync.disk import ask

if TYPE_CHECKING:
    from miles_api.services import Endpoint

__all__ = ["FixedWeights"]


class FixedWeights:
    """Pushes nothing, and knows by which version the engines call what they loaded."""

    def __init__(self, endpoints: list[Endpoint]) -> None:
        """Ask every engine for its version; raises `ServiceError` if they differ."""
        versions = {endpoint.url: str(ask(endpoint, "/model_info").get("weight_version")) for endpoint in endpoints}
        if len(set(versions.values())) > 1:
            raise ServiceError(f"the engines serve different weights: {versions}")
        self._version = next(iter(versions.values()))

    def push(self, weight_version: str) -> None:
        """Do nothing."""

    def served(self, weight_version: str) -> str:  # noqa: ARG002  the trainer's count means nothing here
        """Return the version of what the engines loaded."""
        return self._version

    def close(self) -> None:
        """Do nothing."""
