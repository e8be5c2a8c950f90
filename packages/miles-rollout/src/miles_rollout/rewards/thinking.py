"""Where an answer begins: after the reasoning that a model writes between its thinking tags."""

from __future__ import annotations

__all__ = ["after_thinking"]

_END = "</think>"


def after_thinking(response: str) -> str:
    """Return what follows the last `</think>`; the whole response without one."""
    return response.rpartition(_END)[2]
