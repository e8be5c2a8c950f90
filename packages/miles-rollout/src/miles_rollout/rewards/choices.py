"""Which letter an answer to a multiple-choice question names: its last definite statement."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING

import msgspec

from miles_rollout.rewards.boxes import last_boxed

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Question", "plain"]

# Alternatives within these patterns begin with different characters, and lists end after eight: no text makes a search
# backtrack for long.
_LETTER = r"[A-Za-z](?!\w|[-'’]\w)[)\]}*_`\"'”$]*"
_AND = r"\s*(?:(?:[,/&+]|\band\b|\bor\b)\s*){1,3}[(*\[]*"
# In "B and C are wrong" C begins a clause of its own and is no part of the answer.
_CLAUSE = r"\s+(?:is|are|was|were|has|have|does|do|would|can|could|cannot|fails?|think|believe|am)\b"
_LIST = rf"{_LETTER}(?:{_AND}{_LETTER}(?!{_CLAUSE})){{0,8}}"
_LETTERS = re.compile(_LIST)
_SINGLE = re.compile(r"(?<!\w)[A-Za-z](?!\w)")
_CAPITAL = re.compile(r"(?<![\w'’])[A-Z](?!\w|[-'’]\w)")
_OPENING = re.compile(
    r"(?:[\s*_`\"'“‘$:>\[({=]|\\(?:boxed|fbox|text|textbf|mathrm|mathbf)\s*\{|\\[(\[,;! ]"
    r"|\b(?:option|choice|letter|the|either|both|therefore|thus|hence|clearly|definitely|probably|most|likely|indeed"
    r"|simply|obviously)\b)*",
    re.IGNORECASE,
)
_CLOSING = re.compile(r"[\s.!)\]}*_`\"'”$\\]*")
_LOWER_WORD = re.compile(r"\s+[^\W\d_A-Z]")
_LABELLED = re.compile(r"[\s(\[*_`>#-]*([A-Z])\s*[*_]*[).:\]]")

_KEYWORD = re.compile(r"\b(?:answer|option|choice)\b", re.IGNORECASE)
_LINK = re.compile(r"\b(?:is|be)\b|[:=\n]|-+>|→|⇒", re.IGNORECASE)
_REACH = 80  # characters between "answer" and "is"
_DECORATION = re.compile(r"[\s*_`#)]*")
_SENTENCE_END = re.compile(r"[.?!;](?:\s|$)")
_NEGATED = re.compile(r"\b(?:not|neither|nor|unlike)\b|n['’]t\b", re.IGNORECASE)
_PICK = re.compile(
    r"\b(?:choose|chose|chosen|select|selected|pick|picked|go with|going with|went with|opt for)\b", re.IGNORECASE
)
_CORRECT = re.compile(
    rf"(?<![\w'’])(?P<named>(?=[A-Z]){_LETTER}(?:{_AND}{_LETTER}){{0,8}})\s+(?:is|are|(?:must|should|would) be)\s+"
    r"(?:(?:the|clearly|definitely|indeed|therefore|thus|most|likely|probably|both)\s+)*(?:correct|right|best)\b"
    r"(?=\s*(?:[.,;:!)*]|$|(?:answers?|options?|choices?|one|because|since|as)\b))",
    re.MULTILINE,
)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf)\b|[*_`$\\{}]")
_ENDS = " .,;:!?\"'“”‘’"
_LINE = 1000  # characters of a line that are searched for the text of a choice
_NEAR = 10  # characters between "option" and its letter, the word included
_LATEST = 64  # statements of a kind that are looked at: a response may be nothing but "answer is answer is"


def plain(text: str) -> str:
    """Return a text for comparing: case, markup, runs of spaces and the punctuation around it are left out."""
    return " ".join(_MARKUP.sub("", unicodedata.normalize("NFKC", text).casefold()).split()).strip(_ENDS)


class Question(msgspec.Struct, frozen=True):
    """The letters of a question, and the texts behind them where they are known."""

    letters: tuple[str, ...]
    """Capital letters, in the order of the choices."""
    texts: dict[str, str] = {}
    """Letter to `plain` text of its choice."""

    def named(self, answer: str) -> frozenset[str]:
        """Return the letters that the last definite statement of `answer` names.

        Empty where nothing is named; several letters where the statement hedges ("B or C").
        """
        stated = max(self._statements(answer), key=lambda found: found[0], default=None)
        return stated[1] if stated else self._unstated(answer)

    def mentioned(self, text: str) -> list[tuple[int, int, str]]:
        """Return start, end and letter of each choice in a `plain` text, where its words stand last.

        Left out are choices that are part of another one there, as "5 m" is of "5 m per second".
        """
        found = [(*span, letter) for letter, choice in self.texts.items() if choice and (span := _last(choice, text))]
        return [a for a in found if not any(b != a and b[0] <= a[0] and a[1] <= b[1] for b in found)]

    def _statements(self, answer: str) -> Iterator[tuple[int, frozenset[str]]]:
        box = last_boxed(answer)
        if box is not None and (named := self._read(box, 0)):
            yield answer.rfind("{" + box + "}"), named
        for keyword in _latest(_KEYWORD, answer):
            if named := self._linked(answer, keyword):
                yield keyword.start(), named
        for pick in _latest(_PICK, answer):
            if named := self._choice_at(answer, pick.end()) or self._letters_at(answer, pick.end()):
                yield pick.start(), named
        for statement in _latest(_CORRECT, answer):
            if named := self._valid(statement["named"]):
                yield statement.start(), named

    def _linked(self, answer: str, keyword: re.Match[str]) -> frozenset[str]:
        """Return what follows "answer is", "Answer:", "the answer to this question must be" and the like."""
        start, is_answer = keyword.end(), keyword.group().lower() == "answer"
        for link in _LINK.finditer(answer, start, start + _REACH):
            between = answer[start : link.start()]
            if _SENTENCE_END.search(between):
                break
            if _DECORATION.fullmatch(between):
                return self._read(answer, link.end(), tight=link.group() == "\n")
            if is_answer and link.group().isalpha() and (named := self._read(answer, link.end())):
                return named
        return self._letters_at(answer, start, tight=True) if is_answer else frozenset()

    def _read(self, text: str, position: int, *, tight: bool = False) -> frozenset[str]:
        """Return the choice or the letters at a position, else the choice that the rest of the line names."""
        return (
            self._choice_at(text, position)
            or self._letters_at(text, position, tight=tight)
            or self._choice_ahead(text, position)
        )

    def _letters_at(self, text: str, position: int, *, tight: bool = False) -> frozenset[str]:
        """Return the letters at a position; if `tight`, only such as no word follows."""
        opening = _OPENING.match(text, position)
        found = _LETTERS.match(text, opening.end() if opening else position)
        if found is None:
            return frozenset()
        # "The answer is a proton", "the answer is I think": words that look like letters.
        word = found.group()[0].islower() or found.group()[0] == "I"
        if (tight or word) and _LOWER_WORD.match(text, found.end()):
            return frozenset()
        return self._valid(found.group())

    def _choice_at(self, text: str, position: int) -> frozenset[str]:
        """Return the choice whose text begins at a position: letters as texts aside, which `_letters_at` reads."""
        line = text[position : position + _LINE].lstrip().partition("\n")[0]
        rest = plain(line), plain(line[_end(_OPENING.match(line)) :])
        starts = [
            (len(choice), letter)
            for letter, choice in self.texts.items()
            if len(choice) > 1 and any(_starts(choice, words) for words in rest)
        ]
        return frozenset({max(starts)[1]}) if starts else frozenset()

    def _choice_ahead(self, text: str, position: int) -> frozenset[str]:
        line = plain(text[position : position + _LINE].partition("\n")[0])
        return self._mention(line, min(self.mentioned(line), default=None))

    def _unstated(self, answer: str) -> frozenset[str]:
        """Return what an answer without a statement comes to: alone, on its last line, or anywhere."""
        text = answer.strip()
        opening = _end(_OPENING.match(text))
        alone = _LETTERS.match(text, opening)
        if alone and _CLOSING.fullmatch(text, alone.end()):
            return self._valid(alone.group())
        last_line = text.rpartition("\n")[2]
        labelled = _LABELLED.match(last_line)
        if labelled and labelled[1] in self.letters:
            return frozenset({labelled[1]})
        return self._last_mention(last_line) or self._last_capital(text) or self._last_mention(text)

    def _last_mention(self, text: str) -> frozenset[str]:
        words = plain(text)
        return self._mention(words, max(self.mentioned(words), default=None))

    def _mention(self, words: str, found: tuple[int, int, str] | None) -> frozenset[str]:
        """Return a choice found in words, unless what stands before it says that it is not the one."""
        if found is None or _NEGATED.search(words, max(0, found[0] - _REACH), found[0]):
            return frozenset()
        return frozenset({found[2]})

    def _last_capital(self, text: str) -> frozenset[str]:
        capitals = [
            found.group()
            for found in _CAPITAL.finditer(text)
            if found.group() in self.letters and not _is_word(text, found)
        ]
        return frozenset(capitals[-1:])

    def _valid(self, text: str) -> frozenset[str]:
        return frozenset(letter.upper() for letter in _SINGLE.findall(text)) & frozenset(self.letters)


def _latest(pattern: re.Pattern[str], text: str) -> list[re.Match[str]]:
    return list(pattern.finditer(text))[-_LATEST:]


def _is_word(text: str, found: re.Match[str]) -> bool:
    """Say whether a capital is the article or the pronoun: "A proton", "I think", but not "option A must"."""
    if found.group() not in "AI" or not _LOWER_WORD.match(text, found.end()):
        return False
    return not _KEYWORD.search(text, max(0, found.start() - _NEAR), found.start())


def _end(found: re.Match[str] | None) -> int:
    return found.end() if found else 0


def _starts(choice: str, text: str) -> bool:
    return text.startswith(choice) and not re.match(r"\w|[.,]\d", text[len(choice) :])


def _last(choice: str, text: str) -> tuple[int, int] | None:
    """Return where a choice stands last in a text, as words and numbers of their own."""
    spans = [found.span() for found in re.finditer(rf"(?<![\w.\-]){re.escape(choice)}(?!\w|[.,]\d)", text)]
    return spans[-1] if spans else None
