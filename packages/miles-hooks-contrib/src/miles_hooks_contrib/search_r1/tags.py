"""The language of a Search-R1 conversation: which action a turn takes, what it is answered, and its right form."""

from __future__ import annotations

import re
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = [
    "CORRECTION",
    "STOPS",
    "Action",
    "action_of",
    "has_right_form",
    "observation",
    "texts_in",
    "without_tags",
]

STOPS = ("</search>", "</answer>")
"""What ends a turn."""

CORRECTION = (
    "\nMy previous action is invalid. If I want to search, I should put the query between <search> and </search>. "
    "If I want to give the final answer, I should put the answer between <answer> and </answer>. Let me try again.\n"
)
"""What a turn without an action is answered, as in the paper."""

_TAG = re.compile(r"(</?(?:think|search|information|answer)>)")
_BEFORE = {
    "<think>": ("start", "</information>"), "</think>": ("<think>",),
    "<search>": ("</think>",), "</search>": ("<search>",),
    "<information>": ("</search>",), "</information>": ("<information>",),
    "<answer>": ("</think>",), "</answer>": ("<answer>",),
}  # fmt: skip
"""By tag: after which ones it may stand."""


class Action(NamedTuple):
    """What the model asks for: `search` with a query, or `answer`."""

    kind: str
    text: str


def texts_in(kind: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield where each closed `<kind>` of a text begins, and what stands in it; one pass, whatever a model repeats."""
    opening, closing = f"<{kind}>", f"</{kind}>"
    begin = text.find(opening)
    while begin >= 0 and (end := text.find(closing, begin + len(opening))) >= 0:
        yield begin, text[begin + len(opening) : end]
        begin = text.find(opening, end + len(closing))


def action_of(turn: str) -> Action | None:
    """Return the first action of one turn; None for a turn without one, or with an empty query."""
    firsts = [(begin, kind, said) for kind in ("search", "answer") for begin, said in islice(texts_in(kind, turn), 1)]
    if not firsts:
        return None
    _, kind, said = min(firsts)
    return None if kind == "search" and not said.strip() else Action(kind, said.strip())


def without_tags(text: str) -> str:
    """Return `text` without the tags of the conversation: a passage must not end its own frame, or answer."""
    # A space, for without it the halves of another could join.
    return _TAG.sub(" ", text)


def observation(passages: Sequence[str]) -> str:
    """Return passages in the paper's form; the first line of each is its title."""
    shown = []
    for number, passage in enumerate(passages, start=1):
        title, _, text = without_tags(passage).partition("\n")
        shown.append(f"Doc {number}(Title: {title}) {text}\n")
    return "".join(shown).strip()


def has_right_form(response: str) -> bool:
    """Say whether a response is think, then search and information and think again as often as wanted, then answer.

    Nothing but white space may stand between the tags and after the answer.
    """
    last = "start"
    for part in _TAG.split(response):
        if part in _BEFORE:
            if last not in _BEFORE[part]:
                return False
            last = part
        elif part.strip() and (last == "start" or last.startswith("</")):
            return False
    return last == "</answer>"
