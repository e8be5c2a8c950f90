"""How graders show a value of the data in a message."""

from __future__ import annotations

from typing import Any

__all__ = ["shown"]

_WIDTH = 60


def shown(value: Any) -> str:
    """Return a value as it is written in Python: its start, if it is long."""
    text = repr(value)
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."
