"""DAPO's verdict, 1 or -1: the last `Answer: …` near the end, in Minerva's normal form (arXiv 2503.14476, 2206.14858).

The original takes every label for an integer and raises on others; here a label of any kind is compared.
"""

from __future__ import annotations

import re
from typing import Any

from miles_rollout.rewards.math import same_number
from miles_rollout.rewards.math_text import accepted_answers, as_integer, is_integer

__all__ = ["dapo_answer", "dapo_right", "dapo_score", "minerva"]

_LAST_CHARACTERS = 300
_ANSWER = re.compile(r"answer\s*:\s*([^\n]+)", re.IGNORECASE)

_WORDS = (
    "square", "ways", "integers", "dollars", "mph", "inches", "hours", "km", "units", "\\ldots", "sue", "points",
    "feet", "minutes", "digits", "cents", "degrees", "cm", "gm", "pounds", "meters", "meals", "edges", "students",
    "childrentickets", "multiples", "\\text{s}", "\\text{.}", "\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}",
    "\\text{}", "\\mathrm{th}", "^\\circ", "^{\\circ}", "\\;", ",\\!", "{,}", '"', "\\dots", "<|im_end|>",
    "<|endoftext|>",
)  # fmt: skip
_ARTICLES = re.compile(r"an |a |\\\$|\\ | ")
_STYLED = re.compile(r"\\(?:text|textbf|overline)\{(.*?)\}")
_MATHS = re.compile(r"\$(.*?)\$")
_BOX = re.compile(r"\\boxed\{(.*)\}")


def dapo_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the last `Answer: …` of the last 300 characters is the label, else -1.0."""
    answer = dapo_answer(response)
    return 1.0 if answer is not None and dapo_right(answer, label) else -1.0


def dapo_answer(response: str) -> str | None:
    """Return what the last `Answer:` of the last 300 characters says; None without one."""
    lines = _ANSWER.findall(response[-_LAST_CHARACTERS:])
    return lines[-1] if lines else None


def dapo_right(answer: str, label: Any) -> bool:
    """Say whether an answer is one that the label accepts: the same in Minerva's normal form.

    An integer must be written as one. Of other labels, which the original does not know, the same number is right too.
    """
    ours = minerva(answer)
    for wanted in accepted_answers(label):
        theirs = minerva(wanted)
        if ours in (theirs, as_integer(theirs)) or (not is_integer(theirs) and same_number(ours, theirs)):
            return True
    return False


def minerva(text: str) -> str:
    """Return an answer in Minerva's normal form: what follows the last `=`, without units, articles, styles and `$`."""
    text = text.rpartition("=")[2]
    text = _ARTICLES.sub("", text.replace(".$", "$")).replace("mbox", "text")
    text = text.replace(",\\text{and}", ",").replace("\\text{and}", ",").replace("\\text{m}", "\\text{}")
    for word in _WORDS:
        text = text.replace(word, "")
    maths = _MATHS.search(text)
    text = maths.group(1) if maths else text
    text = _BOX.sub(r"\1", _STYLED.sub(r"\1", text))
    text = re.sub(r"frac([^{])(.)", r"frac{\1}{\2}", text)
    text = re.sub(r"sqrt([^{])", r"sqrt{\1}", text).replace("$", "")
    plain = text.replace(",", "")
    return (plain if plain.isdigit() else text).strip()
