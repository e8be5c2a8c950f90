"""What DeepScaleR asks of sympy: is the difference of two answers zero? Runs in a grading process."""

from __future__ import annotations

import re
from typing import Any

import sympy
from sympy.parsing import sympy_parser

from miles_rollout.rewards.deepscaler import boxed_answer, open_pairs, quick_deepscaler
from miles_rollout.rewards.math_text import accepted_answers

__all__ = ["deepscaler_score"]

# Answers are untrusted, and sympy's parser evaluates Python: these are all the names there are.
_NAMES = {
    name: getattr(sympy, name)
    for name in ("Integer", "Float", "Rational", "Symbol", "Function", "factorial", "factorial2", "sqrt", "pi", "ln")
}
_ALLOWED = frozenset("0123456789abcdefghijklmnopqrstuvwxyz+-*/^()., !")
_ATTRIBUTE = re.compile(r"[^0-9 ] *\.|\. *[a-z(]")
"""A dot that does not belong to a number."""
_RULES = (*sympy_parser.standard_transformations, sympy_parser.implicit_multiplication_application)


def deepscaler_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the boxed answer after the thinking is right, else 0.0."""
    quick = quick_deepscaler(response, label, metadata)
    if quick is not None:
        return quick
    answer = boxed_answer(response) or ""
    every = (open_pairs(answer, wanted) for wanted in accepted_answers(label))
    return float(any(pairs and all(_equal(a, b) for a, b in pairs) for pairs in every))


def _equal(a: str, b: str) -> bool:
    text = f"({a})-({b})"
    if not _ALLOWED.issuperset(text) or _ATTRIBUTE.search(text):
        return False
    try:
        parsed = sympy_parser.parse_expr(
            text.replace("^", "**"), transformations=_RULES, global_dict={**_NAMES, "__builtins__": {}}
        )
        return bool(sympy.simplify(parsed) == 0)
    except MemoryError:
        raise
    except Exception:
        # Text that is no formula, and formulas that sympy cannot simplify: not known to be equal.
        return False
