"""Is a final answer the labelled one: equal text first, then equal numbers, then math-verify where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
import re
from fractions import Fraction
from typing import Any

__all__ = ["final_answer", "last_boxed", "math_score"]

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
_NOISE = re.compile(r"\\[,!;]|\\left|\\right|[\s$%]|\\text\{\s*\}")
_FRACTION = re.compile(r"\\[dt]?frac\{(-?\d+)\}\{(-?\d+)\}")

_math_verify: Any = None
if importlib.util.find_spec("math_verify") is not None:
    _math_verify = importlib.import_module("math_verify")


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

    Beyond equal text and equal rational numbers, expressions are compared by math-verify (`miles-rollout[rewards]`).
    """
    answer, wanted = _plain(final_answer(response)), _plain(str(label))
    if answer == wanted:
        return 1.0
    ours, theirs = _rational(answer), _rational(wanted)
    if ours is not None and theirs is not None:
        return float(ours == theirs)
    return float(_math_verify is not None and _verified(answer, wanted))


def _plain(text: str) -> str:
    return _FRACTION.sub(r"\1/\2", _NOISE.sub("", text)).rstrip(".")


def _rational(text: str) -> Fraction | None:
    try:
        return Fraction(text.replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None


def _verified(answer: str, wanted: str) -> bool:
    # The library's own deadlines use signals, which raise outside the main thread.
    parse = {"parsing_timeout": None}
    gold, given = (_math_verify.parse(f"${text}$", **parse) for text in (wanted, answer))
    return bool(_math_verify.verify(gold, given, timeout_seconds=None))
