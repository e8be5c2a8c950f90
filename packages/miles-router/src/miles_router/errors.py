"""How an exchange with an engine ends early."""

from __future__ import annotations

__all__ = ["ClientGoneError", "ConnectError", "HungError", "LocalError", "LostError", "SilentError", "UpstreamError"]


class UpstreamError(Exception):
    """The base of what ends an exchange early."""


class ConnectError(UpstreamError):
    """No connection could be made; nothing was sent. `refused`: because nothing listens there."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


class LocalError(UpstreamError):
    """This machine or process is short of what a connection takes, which is no engine's fault; nothing was sent."""


class LostError(UpstreamError):
    """The engine closed the connection or sent something that is not HTTP."""


class SilentError(UpstreamError):
    """The engine stayed silent for too long."""


class HungError(UpstreamError):
    """The engine does not even answer what costs it nothing."""


class ClientGoneError(UpstreamError):
    """The client left, so nobody waits for the answer."""
