"""Multiple choice, as in GPQA (arXiv 2311.12022): the letter that an answer names, against the right one."""

from __future__ import annotations

import re
import string
from typing import Any

from miles_api.errors import DataError
from miles_rollout.rewards.choices import Question, plain
from miles_rollout.rewards.thinking import after_thinking
from miles_rollout.rewards.wording import shown

__all__ = ["gpqa_check", "gpqa_score"]

_DEFAULT_LETTERS = tuple(string.ascii_uppercase[:10])
_READ = 20_000  # characters: statements stand at the end, and the search for them is in nobody's pool
_LETTER = re.compile(r"(?:\\(?:boxed|text)\{|[\s(\[*$\"'])*([A-Za-z])[\s)\]}.:*$\"']*")
_LETTER_AND_TEXT = re.compile(r"\s*\(?([A-Za-z])[).:]\s+(.*)", re.DOTALL)


def gpqa_score(response: str, label: Any, metadata: dict[str, Any]) -> float:
    """Return 1.0 if the last definite statement of a response names the right choice and no other, else 0.0.

    `metadata` may hold `choices` (a list of texts, or an object of letter and text), `valid_letters` and
    `correct_letter`. Without `correct_letter`, `label` tells which one is right: a letter, an index from 0, or the text
    of a choice. Without choices, a `label`, `correct_answer` or `answer_text` that is a text is looked for in a
    response that names no letter. Of the response the last 20,000 characters are read, and nothing before `</think>`.
    Raises `DataError` if nothing tells what is right.
    """
    question, letter, texts = _key(label, metadata)
    answer = after_thinking(response)[-_READ:]
    if letter is not None and (named := question.named(answer)):
        return float(named == {letter})
    wanted = Question(question.letters, {str(at): text for at, text in enumerate(texts)})
    return float(bool(wanted.mentioned(plain(answer))))


def gpqa_check(label: Any, metadata: dict[str, Any]) -> None:
    """Raise `DataError` unless label and metadata say what is right."""
    _key(label, metadata)


def _key(label: Any, metadata: dict[str, Any]) -> tuple[Question, str | None, list[str]]:
    """Return the question, the right letter if there is one, and without choices the texts that are right."""
    question = _question(metadata)
    stated = metadata.get("correct_letter")
    if stated not in (None, ""):
        letter = _letter(stated, question)
        if letter is None:
            raise DataError(f"metadata correct_letter is {shown(stated)}: expected one of {_among(question.letters)}")
    else:
        letter = _labelled(label, question)
    texts = [metadata.get("correct_answer"), metadata.get("answer_text"), None if letter else label]
    known = [text for item in texts if isinstance(item, str) and (text := plain(item))]
    if question.texts and letter is None:
        letter = next((at for at, text in question.texts.items() if text in known), None)
    if letter is None and (question.texts or not known):
        raise DataError(
            f"label is {shown(label)} and metadata has no correct_letter: expected one of {_among(question.letters)}, "
            "an index from 0, or the text of a choice"
        )
    return question, letter, [] if question.texts else known


def _question(metadata: dict[str, Any]) -> Question:
    choices = metadata.get("choices")
    letters = _valid_letters(metadata.get("valid_letters"))
    if isinstance(choices, dict):
        keys = [str(key).strip().upper() for key in choices]
        if letters is None and all(len(key) == 1 and key in string.ascii_uppercase for key in keys):
            letters = tuple(keys)
        choices = list(choices.values())
    if choices is None:
        return Question(letters or _DEFAULT_LETTERS)
    if not isinstance(choices, list | tuple):
        raise DataError(
            f"metadata choices is {shown(choices)}: expected a list of texts, or an object of letter and text"
        )
    letters = letters or tuple(string.ascii_uppercase[: len(choices)])
    if len(choices) > len(letters):
        raise DataError(
            f"metadata has {len(choices)} choices and letters for {len(letters)}: name them in valid_letters"
        )
    return Question(
        letters or _DEFAULT_LETTERS, {at: plain(str(text)) for at, text in zip(letters, choices, strict=False)}
    )


def _valid_letters(stated: Any) -> tuple[str, ...] | None:
    if stated in (None, "", []):
        return None
    letters = [str(item).strip().upper() for item in stated] if isinstance(stated, str | list | tuple) else []
    if not letters or not all(len(letter) == 1 and letter in string.ascii_uppercase for letter in letters):
        raise DataError(f"metadata valid_letters is {shown(stated)}: expected a list of single letters")
    return tuple(letters)


def _labelled(label: Any, question: Question) -> str | None:
    """Return the letter that a label stands for; None if it is a text of no known choice."""
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if isinstance(label, int) and not isinstance(label, bool):
        return question.letters[label] if 0 <= label < len(question.letters) else None
    if not isinstance(label, str):
        return None
    text = plain(label)
    by_text = next((letter for letter, choice in question.texts.items() if choice == text), None)
    both = _LETTER_AND_TEXT.fullmatch(label)
    if both and question.texts.get(both[1].upper(), "") == plain(both[2]):
        return both[1].upper()
    return _letter(label, question) or by_text


def _letter(stated: Any, question: Question) -> str | None:
    found = _LETTER.fullmatch(stated) if isinstance(stated, str) else None
    return found[1].upper() if found and found[1].upper() in question.letters else None


def _among(letters: tuple[str, ...]) -> str:
    return ", ".join(letters)
