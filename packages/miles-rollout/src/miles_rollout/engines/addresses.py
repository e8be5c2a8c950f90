"""Where engines listen, at a port that nobody else can take meanwhile, and where they are reached."""

from __future__ import annotations

import errno
import ipaddress
import socket
from typing import TYPE_CHECKING

from miles_api.errors import ServiceError

if TYPE_CHECKING:
    from miles_rollout.options import EngineFleetOptions

__all__ = ["bound_socket", "url_of"]

_LAST_PORT = 65535
_SOMEWHERE = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}
"""Addresses of documentation: nobody has them, and the way to them is the way out."""


def bound_socket(index: int, options: EngineFleetOptions) -> socket.socket:
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


def url_of(sock: socket.socket, node: str = "") -> str:
    """Return the URL at which others reach what listens at a socket's address.

    Where it listens on every address of the machine, it is at `node`, or else at the one from which the machine speaks
    to others.
    """
    host, port = sock.getsockname()[:2]
    if ipaddress.ip_address(host.partition("%")[0]).is_unspecified:
        host = node or _outward(sock.family, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _outward(family: socket.AddressFamily, unspecified: str) -> str:
    """Return the address other machines reach this one at; connecting a UDP socket sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((_SOMEWHERE[family], 9))
        except OSError:  # a machine without a network
            return "::1" if unspecified == "::" else "127.0.0.1"
        return probe.getsockname()[0]


def _cannot_listen(index: int, options: EngineFleetOptions, port: int, error: OSError) -> str:
    reason = error.strerror or error
    if options.rollout_engine_base_port is None or error.errno not in (errno.EADDRINUSE, errno.EACCES):
        advice = f"--engine-host {options.engine_host} is not an address of this machine, or it has no port left"
    else:
        advice = (
            f"--rollout-engine-base-port {options.rollout_engine_base_port} gives it this port, which is taken or not "
            "allowed; choose another, or leave it out: then free ones are taken"
        )
    return f"engine {index} cannot listen on {options.engine_host}:{port} ({reason}): {advice}"
