"""What can be set about conversations of several turns."""

from __future__ import annotations

from typing import Annotated

import msgspec

from miles_api.options import Options

__all__ = ["GenerateOptions"]


class GenerateOptions(Options, frozen=True, kw_only=True):
    """Conversations of several turns, with tools."""

    generate_max_turns: Annotated[int, msgspec.Meta(ge=1)] = 16
    """Most answers of the model in one conversation of `multi_turn`; one that still calls tools then is truncated."""
