"""What the engine refuses, told apart by who is at fault."""

from __future__ import annotations

__all__ = ["CheckpointError", "EngineDeadError", "ReleasedError", "RequestError", "UnsupportedModelError"]


class RequestError(ValueError):
    """A request cannot be served as asked; answered with HTTP 400 and this text."""


class CheckpointError(ValueError):
    """A model directory lacks a file, or its weights do not fit the model."""


class UnsupportedModelError(ValueError):
    """A model's configuration changes the maths in a way this implementation does not cover."""


class EngineDeadError(RuntimeError):
    """The model loop has stopped after an error; no request can be served any more."""


class ReleasedError(RuntimeError):
    """Weights or keys and values have no memory just now; answered with HTTP 503, as others may serve the request."""
