"""The router's listening socket: whoever starts a router may hold it, so that the port outlives the process."""

from __future__ import annotations

import errno
import os
import socket

from miles_api.errors import ServiceError

__all__ = ["bind"]

_BACKLOG = 2048


def bind(host: str, port: int) -> socket.socket:
    """Return a bound, listening TCP socket. Raises `ServiceError`, which names the flag to change."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as exc:
        reason = os.strerror(exc.errno) if exc.errno in errno.errorcode else str(exc)
        if exc.errno in (errno.EADDRINUSE, errno.EACCES):
            advice = f"--sglang-router-port {port} is taken or not allowed; choose another, or 0 for a free one"
        else:
            advice = f"--sglang-router-ip {host} is not an address of this machine"
        raise ServiceError(f"the router cannot listen on {host}:{port} ({reason}): {advice}") from exc
