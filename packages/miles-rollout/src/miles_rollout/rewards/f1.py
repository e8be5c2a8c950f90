"""Token F1 after SQuAD's normalisation (arXiv 1606.05250): lower case, no punctuation, no articles."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

__all__ = ["f1_score", "squad_words"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """Return the words of a text after SQuAD's normalisation."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def f1_score(response: str, label: Any) -> float:
    """Return the best token F1 over the accepted answers: `label` is one answer or a list of them."""
    answers = label if isinstance(label, list) else [label]
    return max((_f1(squad_words(response), squad_words(str(answer))) for answer in answers), default=0.0)


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))
