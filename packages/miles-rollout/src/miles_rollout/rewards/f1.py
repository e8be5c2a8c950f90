"""Token F1 after SQuAD's normalisation (arXiv 1606.05250): lower case, no punctuation, no articles."""

from __future__ import annotations

import re
import string
from collections import Counter
from typing import Any

from miles_api.errors import DataError
from miles_rollout.rewards.wording import shown

__all__ = ["accepted_answers", "f1_check", "f1_score", "squad_words"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# SQuAD has `text`, NQ-open `answer`, TriviaQA `value` and `aliases`.
_KEYS = ("text", "answer", "answers", "value", "aliases")


def squad_words(text: str) -> list[str]:
    """Return the words of a text after SQuAD's normalisation."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def accepted_answers(label: Any) -> list[str]:
    """Return the texts that a label accepts.

    A label is one answer; a list of them; an object that holds either under `text`, `answer`, `answers`, `value` or
    `aliases`, as SQuAD, NQ and TriviaQA are published; or None or an empty list for a question without an answer,
    which only an empty response answers. Anything else stands for its own text.
    """
    found: list[str] = []
    waiting = [label]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list | tuple):
            waiting += item
        elif isinstance(item, dict) and any(key in item for key in _KEYS):
            waiting += [item[key] for key in _KEYS if key in item]
        elif item is not None:
            found.append(str(item))
    # As the official script does: an answer that is all punctuation and articles counts if there is no other.
    return [answer for answer in found if squad_words(answer)] or [""]


def f1_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return the best token F1 of a response over the answers that `label` accepts; `metadata` is not read."""
    said = squad_words(response)
    return max(_f1(said, squad_words(answer)) for answer in accepted_answers(label))


def f1_check(label: Any, metadata: dict[str, Any]) -> None:
    """Raise `DataError` for a label that is none, or an object of which no answer can be read."""
    if label is None or (isinstance(label, dict) and not any(key in label for key in _KEYS)):
        raise DataError(
            f"label is {shown(label)}: expected an answer, a list of them, or an object with {', '.join(_KEYS)}; an "
            "empty list for a question without an answer (--label-key names the label)"
        )


def _f1(predicted: list[str], wanted: list[str]) -> float:
    if not predicted or not wanted:
        return float(predicted == wanted)
    common = sum((Counter(predicted) & Counter(wanted)).values())
    return 2 * common / (len(predicted) + len(wanted))
