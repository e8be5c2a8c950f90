"""The router's option group."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import msgspec

from miles_api.errors import ConfigError
from miles_api.options import Options

__all__ = [
    "MIDDLEWARE_HOOK",
    "READY_PREFIX",
    "REPORT_PATH",
    "TOKEN_VARIABLE",
    "RouterOptions",
    "check_binding",
    "is_loopback",
]

MIDDLEWARE_HOOK = "router_middleware"
REPORT_PATH = "/hooks"
"""Where a router with middleware reports on it, behind the token like every path but `/health`."""
READY_PREFIX = "miles-router is ready at "
"""What the one line on a router's stdout begins with; its URL follows."""
TOKEN_VARIABLE = "MILES_ROUTER_TOKEN"
"""Where the token comes from when no flag gives it: command lines show in process lists."""


class RouterOptions(Options, frozen=True, kw_only=True):
    """The one address that all generation goes through."""

    sglang_router_ip: str = "127.0.0.1"
    """Address the router listens on; anything but loopback needs `--router-token`."""
    sglang_router_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Port the router listens on; 0 takes a free one."""
    router_policy: Literal["least_outstanding", "round_robin"] = "least_outstanding"
    """How the router picks an engine: the one with the fewest requests under way, or each in turn."""
    router_health_interval: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """Longest wait, in seconds, between two probes of an unhealthy engine; the first comes after a tenth of it."""
    router_request_timeout: Annotated[float, msgspec.Meta(gt=0)] = 1800.0
    """Seconds an engine may stay silent during one request before the client gets a 504."""
    router_max_body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 << 20
    """Longest request body, in bytes, that the router accepts; it holds each one in memory until it is answered."""
    router_token: Annotated[str, msgspec.Meta(min_length=1, extra={"secret": True})] | None = None
    """Bearer token that every request then needs, generation included; only `/health` answers without it."""


def is_loopback(host: str) -> bool:
    """Tell whether `host` can only be reached from this machine; a name other than `localhost` counts as reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_binding(options: RouterOptions) -> None:
    """Refuse to be reachable from other machines without a token.

    Called before anything binds. Raises `ConfigError`.
    """
    if options.router_token is None and not is_loopback(options.sglang_router_ip):
        raise ConfigError(
            f"--sglang-router-ip {options.sglang_router_ip} can be reached from other machines, where anyone could "
            "use and register engines: set --router-token, or listen on 127.0.0.1"
        )
