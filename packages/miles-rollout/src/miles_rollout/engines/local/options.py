"""The local engine's options."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal

import msgspec

from miles_api.errors import ConfigError
from miles_api.options import Options

__all__ = ["LocalEngineOptions", "check_loopback"]


class LocalEngineOptions(Options, frozen=True, kw_only=True):
    """How the local (CPU) inference engines are started; address, port and patience are those of SGLang engines too."""

    engine_max_running_requests: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Requests one local engine decodes together; more wait in its queue."""
    engine_max_total_len: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """Longest prompt plus response, in tokens, of a local engine; by default what the model's config allows."""
    engine_impl: Literal["auto", "lean", "hf"] = "auto"
    """Forward pass of a local engine: `lean` is ours (Llama, Qwen2, Qwen3), `hf` runs transformers; `auto` prefers
    `lean` where it covers the model."""
    engine_host: str = "127.0.0.1"
    """Loopback address the engines listen on; any other is refused, since they ask nobody for a key."""
    engine_start_timeout: Annotated[float, msgspec.Meta(gt=0)] = 300.0
    """Seconds an engine may take to load its model and answer."""
    rollout_engine_base_port: Annotated[int, msgspec.Meta(ge=1, le=65535)] | None = None
    """First port of the engines, counted up; by default the system picks free ones."""


def check_loopback(host: str) -> None:
    """Refuse an address that other machines can reach; a name other than `localhost` counts as one.

    Raises `ConfigError`.
    """
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise ConfigError(
            f"--engine-host {host or repr(host)} is not loopback: an engine obeys whoever reaches it, so it "
            "listens on 127.0.0.1 or ::1 only"
        )
