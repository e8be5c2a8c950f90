"""DeepScaleR's verdicts: the box after `</think>`, compared as PRM800K compares (arXiv 2305.20050).

Equal text after either normalisation is right. Otherwise fractions must be written alike, an integer answers only an
integer, tuples are compared part by part, and what is left goes to sympy if it has at most two letters.
"""

from __future__ import annotations

import re
from typing import Any

from miles_rollout.rewards.boxes import last_boxed
from miles_rollout.rewards.math_text import accepted_answers, is_integer, prm, same_text, without_thousands

__all__ = ["boxed_answer", "open_pairs", "quick_deepscaler"]

_BRACKETS = "()[]"
_FRACTION = re.compile(r"-?[0-9]+.?/0*[1-9][0-9]*.?")
_TOWER = re.compile(r"\^\(|\^\{|\^[0-9]+\^|\^[0-9][0-9]|[0-9]\.?e[-+]?[0-9]{3}|[0-9]{6}!|!\)*!\)*!")
"""Powers, exponents and factorials that sympy might compute for ever."""
_MOST_LETTERS = 2
_LONGEST = 1000
"""Characters of an answer that sympy is asked about."""


def quick_deepscaler(response: str, label: Any, metadata: dict[str, Any]) -> float | None:
    """Return 1.0 or 0.0 if text alone decides, else None: then some pair is left for sympy."""
    answer = boxed_answer(response)
    if answer is None:
        return 0.0
    accepted = accepted_answers(label)
    if any(same_text(answer, wanted) for wanted in accepted):
        return 1.0
    if len(answer) > _LONGEST:
        return 0.0
    return None if any(open_pairs(answer, wanted) for wanted in accepted) else 0.0


def boxed_answer(response: str) -> str | None:
    """Return the last box of what follows the thinking; None if the thinking never ends or no box follows."""
    if "</think>" in response:
        return last_boxed(response.rpartition("</think>")[2])
    parts = response.split("###Response")
    return last_boxed(parts[1]) if len(parts) > 1 else None


def open_pairs(answer: str, wanted: str) -> list[tuple[str, str]]:
    """Return the pairs that must be equal in value for an answer that is other text to be right; empty if it is wrong.

    Both are normalised by `prm`.
    """
    ours, theirs = prm(answer), prm(wanted)
    if not ours:
        return []
    mine, yours = _parts(ours), _parts(theirs)
    brackets_differ = len(yours) > 1 and (ours[0], ours[-1]) != (theirs[0], theirs[-1])
    if brackets_differ or len(mine) != len(yours):
        return []
    pairs = [(a, b) for a, b in zip(mine, yours, strict=True) if a != b]
    return pairs if all(_comparable(a, b) for a, b in pairs) else []


def _comparable(a: str, b: str) -> bool:
    if (_FRACTION.fullmatch(a) and _FRACTION.fullmatch(b)) or is_integer(a) != is_integer(b):
        return False
    both = f"{a} {b}"
    letters = {character for character in both.replace("sqrt", "").replace("frac", "") if character.isalpha()}
    return len(letters) <= _MOST_LETTERS and not _TOWER.search(both.replace("**", "^"))


def _parts(text: str) -> list[str]:
    text = without_thousands(text)
    inner = text[1:-1]
    if inner and text[0] in _BRACKETS and text[-1] in _BRACKETS and not any(mark in inner for mark in _BRACKETS):
        return [part.strip() for part in inner.split(",")]
    return [text]
