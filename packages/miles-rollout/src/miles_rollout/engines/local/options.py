"""The local engine's options."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from miles_api.options import Options

__all__ = ["LocalEngineOptions"]


class LocalEngineOptions(Options, frozen=True, kw_only=True):
    """How the local (CPU) inference engines are started."""

    engine_max_running_requests: Annotated[int, msgspec.Meta(ge=1)] = 256
    """Requests one local engine decodes together; more wait in its queue."""
    engine_max_total_len: Annotated[int, msgspec.Meta(ge=2)] | None = None
    """Longest prompt plus response, in tokens, of a local engine; by default what the model's config allows."""
    engine_impl: Literal["auto", "lean", "hf"] = "auto"
    """Forward pass of a local engine: `lean` is ours (Llama, Qwen2, Qwen3), `hf` runs transformers; `auto` prefers
    `lean` where it covers the model."""
