"""Is a final answer the labelled one: equal text, or equal rational numbers."""

from __future__ import annotations

import re
from fractions import Fraction
from typing import Any

__all__ = ["final_answer", "last_boxed", "math_score"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_RATIONAL = re.compile(r"[-+]?(\d{1,40}(\.\d{0,40})?|\.\d{1,40}|\d{1,40}/\d{1,40})")
_NOISE = re.compile(r"\\[,!;]|\\left|\\right|[\s$%]|\\text\{\s*\}")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")


def last_boxed(text: str) -> str | None:
    """Return what the last `\\boxed{…}` holds, nested braces included; None without a closed one."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for end in range(start + len("\\boxed"), len(text)):
        depth += (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[start + len("\\boxed{") : end]
    return None


def final_answer(response: str) -> str:
    """Return the last boxed answer, else the last number, else the whole response."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    numbers = _NUMBER.findall(response)
    return numbers[-1] if numbers else response


def math_score(response: str, label: Any) -> float:
    """Return 1.0 if the response's final answer equals `label`, else 0.0; a label of any kind can be compared.

    Answers are equal as text (spaces, `\\left`, `$` and the like aside) or as integers, decimals and fractions.
    """
    answer, wanted = _plain(final_answer(response)), _plain(str(label))
    if answer == wanted:
        return 1.0
    ours, theirs = _rational(answer), _rational(wanted)
    return float(ours is not None and ours == theirs)


def _plain(text: str) -> str:
    return _FRACTION.sub(r"\1/\2", _NOISE.sub("", text)).rstrip(".")


def _rational(text: str) -> Fraction | None:
    plain = text.replace(",", "")
    # No exponents and a bound on digits: a model may write 1e30000000, and building that number takes for ever.
    if not _RATIONAL.fullmatch(plain):
        return None
    try:
        return Fraction(plain)
    except ZeroDivisionError:
        return None
