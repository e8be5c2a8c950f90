"""What the bodies of all requests under way may take together."""

from __future__ import annotations

from .routing import Refusal

__all__ = ["BodyMemory"]


class BodyMemory:
    """Counts the bytes that are held: each from its arrival to the end of its request."""

    __slots__ = ("held", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def take(self, size: int) -> None:
        """Count bytes that arrived. Raises `Refusal`, and counts nothing, where they are too many."""
        if self.held + size > self.limit:
            text = f"the requests under way hold {self.held} bytes of bodies already (--router-max-body-memory)"
            raise Refusal(503, "body_memory_full", text)
        self.held += size

    def give(self, size: int) -> None:
        """Say that so many bytes are not held any more."""
        self.held -= size
