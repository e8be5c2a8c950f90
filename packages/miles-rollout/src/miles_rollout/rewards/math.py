"""Is a final answer the labelled one? What text and numbers can tell; `math_verified` has the rest."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from miles_rollout.rewards.boxes import last_boxed
from miles_rollout.rewards.math_text import accepted_answers, latex_as_text, same_text, without_thousands

__all__ = ["computable", "final_answer", "quick_math", "same_number"]

_NUMBER = re.compile(r"([-+]?)(\d{1,40}(?:\.\d{0,40})?|\.\d{1,40}|\d{1,40}/\d{1,40})(%?)")
_MIXED = re.compile(r"\d +\d")
_SHORT = 200
"""Characters of a response that may be an answer and nothing else."""
_LONGEST = 1000
"""Characters of an answer; a longer one is wrong unasked, unless the label is as long."""
_GROUPING = re.compile(r"[{}\s]|\\left|\\right")
_CHAIN = re.compile(r"\d++(?:(?:\^|\*\*)\(*[-+]?\d+)+")
_DIGITS_ALONE = re.compile(r"\d+")
_VAST_FACTORIAL = re.compile(r"\d{6}!|!\)*!\)*!")
_MOST_DIGITS = 1e6
_DIGITS = 6
"""Decimals to which a decimal number must agree, as in math-verify: 0.333333 is a third."""


def quick_math(response: str, label: Any, metadata: dict[str, Any]) -> float | None:
    """Return 1.0 for an answer that is the same text or number as the label, 0.0 for another number, else None."""
    accepted = accepted_answers(label)
    answer = final_answer(response)
    if not accepted or answer == "":
        return 0.0
    if answer is None:
        text = response.strip()
        return 1.0 if len(text) <= _SHORT and any(same_text(text, wanted) for wanted in accepted) else None
    if len(answer) > _LONGEST and len(answer) > 2 * max(map(len, accepted)):
        return 0.0
    if any(same_text(answer, wanted) for wanted in accepted):
        return 1.0
    accepted = computable(accepted)
    if not accepted or not computable([answer]):
        return 0.0
    same = [same_number(answer, wanted) for wanted in accepted]
    return 1.0 if True in same else None if None in same else 0.0


def final_answer(response: str) -> str | None:
    """Return the last boxed answer, or the whole response if it is but a number; None if it has to be searched for."""
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed.strip()
    text = response.strip()
    return text if not text or _number(text) is not None else None


def same_number(answer: str, wanted: str) -> bool | None:
    """Say whether two answers are the same number; None unless both are integers, decimals, fractions or percents."""
    ours, theirs = _number(answer), _number(wanted)
    if ours is None or theirs is None:
        return None
    if "." not in answer + wanted:
        # 9% may answer 9, but 1/2 is nothing else.
        return bool(ours & theirs)
    return any(round(a, _DIGITS) == round(b, _DIGITS) for a in ours for b in theirs)


def computable(texts: list[str]) -> list[str]:
    """Return the texts without towers of powers and factorials that no machine computes: `9^{9^9}`.

    To sympy they are numbers to be written out. Such a one answers a label of the same text, and nothing else.
    """
    return [text for text in texts if not _has_vast(_GROUPING.sub("", text))]


def _has_vast(text: str) -> bool:
    return bool(_VAST_FACTORIAL.search(text)) or any(map(_is_vast, _CHAIN.findall(text)))


def _is_vast(chain: str) -> bool:
    """Say whether a power, or a power of a power, has more than a million digits."""
    first, *others, last = map(float, _DIGITS_ALONE.findall(chain))
    try:
        for base in reversed(others):
            last = base**last
    except OverflowError:
        return True
    return last * math.log10(max(first, 1.0)) > _MOST_DIGITS


def _number(text: str) -> set[Fraction] | None:
    """Return the values that a number may have: a percentage counts with and without its hundredth."""
    plain = latex_as_text(text.replace("$", "").replace("\\%", "%")).strip()
    # The space of a mixed number, 9 2/5, is a sum.
    found = None if _MIXED.search(plain) else _NUMBER.fullmatch(without_thousands(plain.replace(" ", "")))
    # No exponents and a bound on digits: a model may write 1e30000000, and building that number takes for ever.
    if found is None or re.search(r"/0+$", found[2]):
        return None
    value = Fraction(found[1] + found[2])
    return {value, value / 100} if found[3] else {value}
