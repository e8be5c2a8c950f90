"""The idle connections to an engine, and how new ones are made."""

from __future__ import annotations

import asyncio
import errno

from .connection import UpstreamConnection
from .errors import ConnectError, LocalError
from .heads import ENGINE

__all__ = ["CONNECT_TIMEOUT_S", "ConnectionPool"]

CONNECT_TIMEOUT_S = 5.0
_LOCAL = frozenset((errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOMEM, errno.ENOBUFS))


class ConnectionPool:
    """The idle connections to one engine, most recently used first."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port
        self.name = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}").encode()
        """Which engine it is, for clients."""
        self.head_end = b"\r\n%b: %b\r\n\r\n" % (ENGINE, self.name)
        """What an answer's head ends with, where the rest is passed on as it is."""
        self._closed = False
        self._idle: dict[UpstreamConnection, None] = {}  # ordered, and drops a closed one in constant time

    def take_idle(self) -> UpstreamConnection | None:
        """Return an open idle connection, if there is one."""
        return self._idle.popitem()[0] if self._idle else None

    async def connect(self) -> UpstreamConnection:
        """Open a new connection. Raises `ConnectError` or `LocalError`."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(lambda: UpstreamConnection(self), self._host, self._port)
        except TimeoutError:
            raise ConnectError(f"did not accept a connection within {CONNECT_TIMEOUT_S:g} s") from None
        except UnicodeError as exc:  # a label of more than 63 letters, or of none
            raise ConnectError(f"cannot be connected: {self._host!r} is no host's name") from exc
        except OSError as exc:
            if exc.errno in _LOCAL:
                raise LocalError(f"the router cannot open a connection: {exc.strerror}") from exc
            refused = exc.errno == errno.ECONNREFUSED
            raise ConnectError(f"cannot be connected: {exc.strerror or exc}", refused=refused) from exc
        return connection

    def put(self, connection: UpstreamConnection) -> None:
        """Keep a connection whose exchange is over."""
        if self._closed:
            connection.close()
        else:
            self._idle[connection] = None

    def discard(self, connection: UpstreamConnection) -> None:
        """Forget a connection that closed."""
        self._idle.pop(connection, None)

    def close_idle(self) -> None:
        """Close what is idle; exchanges under way go on."""
        for connection in list(self._idle):
            connection.close()
        self._idle.clear()

    def close(self) -> None:
        """Close what is idle and keep nothing from now on."""
        self._closed = True
        self.close_idle()
