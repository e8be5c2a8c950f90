"""Is a final answer the labelled one, by math-verify: LaTeX parsed, values compared. Runs in a grading process."""

from __future__ import annotations

import functools
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from miles_rollout.rewards.math import computable, final_answer, quick_math
from miles_rollout.rewards.math_text import accepted_answers

__all__ = ["math_score"]

_TAIL = 2000
"""Characters at the end of a response without a box in which its answer is looked for."""
_KEPT = 2048
"""Formulas and verdicts that a process remembers."""
_LABEL = (LatexExtractionConfig(), ExprExtractionConfig())
_ANSWER = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())


def math_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the response's final answer equals `label`, else 0.0; a label of any kind can be compared.

    The final answer is the last box, else what math-verify finds at the end: `the answer is …`, the last formula, the
    last number.
    """
    quick = quick_math(response, label, metadata)
    if quick is not None:
        return quick
    answer = final_answer(response)
    text = response[-_TAIL:] if answer is None else _boxed(answer)
    return float(any(_equal(text, wanted) for wanted in computable(accepted_answers(label))))


# The samples of a group share their label, and many of them their answer.
@functools.lru_cache(_KEPT)
def _equal(text: str, wanted: str) -> bool:
    return any(_pair_equal(gold, found) for gold in _parsed(_boxed(wanted), _LABEL) for found in _parsed(text, _ANSWER))


@functools.lru_cache(_KEPT)
def _parsed(text: str, where: tuple[Any, ...]) -> list[Any]:
    try:
        # No clock of its own: it is an alarm, and the pool has the deadline.
        return parse(text, where, parsing_timeout=0, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        # No formula that the parser knows: nothing to compare.
        return []


def _boxed(text: str) -> str:
    return f"\\boxed{{{text.replace('$', '')}}}"


def _pair_equal(gold: Any, found: Any) -> bool:
    try:
        return verify(gold, found, timeout_seconds=0, raise_on_error=True)
    except MemoryError:
        raise
    except Exception:
        # sympy knows no answer to every question: not known to be equal.
        return False
