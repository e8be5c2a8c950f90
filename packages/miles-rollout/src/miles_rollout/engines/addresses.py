"""The addresses that engines listen on: loopback only, at a port that nobody else can take meanwhile."""

from __future__ import annotations

import errno
import socket
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from miles_rollout.engines.local.options import LocalEngineOptions

__all__ = ["bound_socket", "url_of"]

_LAST_PORT = 65535


def bound_socket(index: int, options: LocalEngineOptions) -> socket.socket:
    """Take the port of engine `index`: of `--rollout-engine-base-port`, or a free one.

    Nobody gets it while the socket is open, but for an engine that binds it with SO_REUSEADDR, as servers do, before
    anyone listens. Raises `ServiceError`.
    """
    port = 0 if options.rollout_engine_base_port is None else options.rollout_engine_base_port + index
    if port > _LAST_PORT:
        raise ServiceError(f"--rollout-engine-base-port leaves no port for engine {index}: {port} is not one")
    sock = socket.socket(socket.AF_INET6 if ":" in options.engine_host else socket.AF_INET)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((options.engine_host, port))
    except OSError as error:
        sock.close()
        raise ServiceError(_cannot_listen(index, options, port, error)) from None
    return sock


def url_of(sock: socket.socket) -> str:
    """Return the URL of what listens at a socket's address."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _cannot_listen(index: int, options: LocalEngineOptions, port: int, error: OSError) -> str:
    reason = error.strerror or error
    if options.rollout_engine_base_port is None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
        advice = f"--engine-host {options.engine_host} is not an address of this machine, or it has no port left"
    else:
        advice = (
            f"--rollout-engine-base-port {options.rollout_engine_base_port} gives it this port, which is taken or not "
            "allowed; choose another, or leave it out: then free ones are taken"
        )
    return f"engine {index} cannot listen on {options.engine_host}:{port} ({reason}): {advice}"
