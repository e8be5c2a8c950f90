"""The router's option group."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from miles_api.addresses import is_loopback
from miles_api.errors import ConfigError
from miles_api.options import Options, flag_of

__all__ = [
    "KEY_VARIABLE",
    "MIDDLEWARE_HOOK",
    "READY_PREFIX",
    "REPORT_PATH",
    "TOKEN_VARIABLE",
    "RouterOptions",
    "check_binding",
    "short_flag",
]

MIDDLEWARE_HOOK = "router_middleware"
REPORT_PATH = "/hooks"
"""Where a router with middleware reports on it, behind the token like every path but `/health`."""
READY_PREFIX = "miles-router is ready at "
"""What the one line on a router's stdout begins with; its URL follows."""
TOKEN_VARIABLE = "MILES_ROUTER_TOKEN"
"""Where the token comes from when no flag gives it: command lines show in process lists."""
KEY_VARIABLE = "MILES_ENGINE_KEY"
"""Where the key of the engines that a router starts with comes from; who registers one later brings its key."""


class RouterOptions(Options, frozen=True, kw_only=True):
    """The one address that all generation goes through."""

    sglang_router_ip: str = "127.0.0.1"
    """Address the router listens on; anything but loopback needs `--router-token`."""
    sglang_router_port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    """Port the router listens on; 0 takes a free one."""
    router_policy: Literal[
        "least_outstanding", "round_robin", "random", "power_of_two", "consistent_hashing", "sticky", "prefix_aware"
    ] = "least_outstanding"
    """How the router picks an engine: the one with the fewest requests under way; each in turn; any; the less loaded
    of two drawn at random; by hash of the header `X-SMG-Routing-Key`; the one that this session (that header, or
    `X-Session-Id`) began with; or one that was sent a prompt with the same beginning."""
    router_health_interval: Annotated[float, msgspec.Meta(gt=0)] = 5.0
    """Longest wait, in seconds, between two probes of an unhealthy engine; the first comes after a tenth of it. A busy
    engine that sends nothing for this long is asked for `/server_info`."""
    router_hang_timeout: Annotated[float, msgspec.Meta(ge=0)] = 300.0
    """Seconds that question may stay unanswered until the engine counts as hung, if another one reacts: its requests
    go to others, and it gets no more until it is healthy. Longer than a weight update or a compilation takes; 0 never
    asks."""
    router_request_timeout: Annotated[float, msgspec.Meta(gt=0)] = 1800.0
    """Seconds an engine may stay silent during one request before the client gets a 504, and a client may read nothing
    of its answer before it is hung up on."""
    router_max_body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 << 20
    """Longest request body, in bytes, that the router accepts; it holds each one in memory until it is answered."""
    router_max_body_memory: Annotated[int, msgspec.Meta(ge=1)] = 2 << 30
    """Most bytes that the bodies of all requests under way take together, waiting ones included; whoever exceeds them
    gets a 503."""
    router_max_worker_requests: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most requests under way at one engine; further ones wait in the queue. 0 sets no limit."""
    router_max_requests: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most requests under way at all engines together; further ones wait in the queue. 0 sets no limit."""
    router_queue_size: Annotated[int, msgspec.Meta(ge=0)] = 4096
    """Most requests that wait, first come, first served; further ones get a 503. Without a limit nothing waits."""
    router_queue_timeout: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Seconds a request may wait in the queue before it gets a 503."""
    router_drain_timeout: Annotated[float, msgspec.Meta(ge=0)] = 5.0
    """Seconds that requests under way are given to end when the router is stopped."""
    router_token: Annotated[str, msgspec.Meta(min_length=1, extra={"secret": True})] | None = None
    """Bearer token that every request then needs, generation included; only `/health` answers without it."""


_SHORT = {"sglang_router_ip": "--host", "sglang_router_port": "--port"}


def short_flag(field: str) -> str:
    """Return what `miles router` calls an option: `--router-policy` of a run is its `--policy`."""
    return _SHORT.get(field) or flag_of(field.removeprefix("router_"))


def check_binding(options: RouterOptions) -> None:
    """Refuse to be reachable from other machines without a token.

    Called before anything binds. Raises `ConfigError`.
    """
    if options.router_token is None and not is_loopback(options.sglang_router_ip):
        raise ConfigError(
            f"--sglang-router-ip {options.sglang_router_ip} can be reached from other machines, where anyone could "
            "use and register engines: set --router-token, or listen on 127.0.0.1"
        )
