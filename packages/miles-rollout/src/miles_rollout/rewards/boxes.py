"""Where an answer stands in a response: in the last box."""

from __future__ import annotations

import re

__all__ = ["last_boxed"]

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"[{}]")


def last_boxed(text: str) -> str | None:
    """Return what the last `\\boxed{…}` holds, nested braces included; None without one, or if it is never closed."""
    start = text.rfind("\\boxed")
    box = _BOX.match(text, start) if start >= 0 else None
    if box is None:
        return None
    depth = 1
    for brace in _BRACE.finditer(text, box.end()):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return text[box.end() : brace.start()]
    return None
