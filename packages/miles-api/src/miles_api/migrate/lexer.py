"""A shell script as words and operators, each with its line; nothing is expanded yet.

Not `shlex`: it forgets which parts of a word were quoted, and so which of them variables are put into.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

__all__ = ["Assignment", "Operator", "Part", "Token", "Word", "tokens", "word_of"]


class Part(msgspec.Struct, frozen=True):
    """A piece of a word that was written in one way."""

    text: str
    kind: Literal["literal", "quoted", "bare"]
    """`literal` stands as it is, `quoted` is expanded to one text, `bare` is expanded and split at spaces."""


class Word(msgspec.Struct):
    """A word, as it was written."""

    parts: list[Part]
    line: int

    @property
    def plain(self) -> str:
        """Return the text without quotes, expansions left in it."""
        return "".join(part.text for part in self.parts)


class Assignment(msgspec.Struct):
    """`NAME=(…)` or `NAME+=(…)`."""

    name: str
    words: list[Word]
    append: bool
    line: int


class Operator(msgspec.Struct):
    """What stands between commands; redirections are left out with their files."""

    text: str
    line: int


Token = Word | Assignment | Operator

_ARRAY = re.compile(r"([A-Za-z_]\w*)(\+?)=")
_HERE = re.compile(r"<<-?\s*(['\"]?)(\w+)\1")
_NAME = re.compile(r"\$(\w+|[@*#?$!-])")
_OPERATORS = ("&&", "||", ";;", ";", "&", "|", "(", ")", "\n")
_ENDS = frozenset(" \t\n;&|()<>")


def tokens(text: str) -> list[Token]:
    """Split a script. What is no proper shell (a quote without its end) is read as far as it makes sense."""
    return _Lexer(text).tokens()


def word_of(text: str, line: int) -> Word:
    """Read a text as one word, spaces included: what stands behind `:-` in `${NAME:-…}`."""
    return _Lexer(text, line).word(ends=frozenset())


class _Lexer:
    def __init__(self, text: str, line: int = 1) -> None:
        self._text = text
        self._at = 0
        self._line = line
        self._here: list[str] = []

    def tokens(self) -> list[Token]:
        found: list[Token] = []
        while self._skip_blank():
            token = self._token(found)
            if token is not None:
                found.append(token)
        return found

    def _token(self, before: list[Token]) -> Token | None:
        if _in_test(before) and self._text.startswith(("&&", "||", "<", ">", "(", ")"), self._at):
            return self._test_operator()
        here = _HERE.match(self._text, self._at)
        if here:
            self._here.append(here[2])
            self._at = here.end()
            return None
        if self._text[self._at] in "<>" or self._text.startswith("&>", self._at):
            self._skip_redirection(before)
            return None
        for operator in _OPERATORS:
            if self._text.startswith(operator, self._at):
                return self._operator(operator)
        return self._array() or self.word()

    def _test_operator(self) -> Word:
        two = self._text[self._at : self._at + 2]
        text = two if two in ("&&", "||") else two[:1]
        self._at += len(text)
        return Word([Part(text, "literal")], self._line)

    def _operator(self, text: str) -> Operator:
        token = Operator(text, self._line)
        self._at += len(text)
        if text == "\n":
            self._line += 1
            while self._here:
                self._skip_here(self._here.pop(0))
        return token

    def _skip_blank(self) -> bool:
        """Move behind spaces, comments and continued lines; say whether there is more."""
        while self._at < len(self._text):
            char = self._text[self._at]
            if self._text.startswith("\\\n", self._at):
                self._at += 2
                self._line += 1
            elif char in " \t\r":
                self._at += 1
            elif char == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            else:
                return True
        return False

    def _skip_here(self, mark: str) -> None:
        while self._at < len(self._text):
            end = self._text.find("\n", self._at)
            end = len(self._text) if end < 0 else end
            line, self._at = self._text[self._at : end], end + 1
            self._line += 1
            if line.strip() == mark:
                return

    def _skip_redirection(self, before: list[Token]) -> None:
        # `2>file`: the number belongs to it.
        if (
            before
            and self._text[self._at - 1].isdigit()
            and isinstance(before[-1], Word)
            and before[-1].plain.isdigit()
        ):
            before.pop()
        while self._at < len(self._text) and self._text[self._at] in "<>&|":
            self._at += 1
        if self._skip_blank() and self._text[self._at] not in _ENDS:
            self.word()

    def _array(self) -> Assignment | None:
        start = _ARRAY.match(self._text, self._at)
        if start is None or not self._text.startswith("(", start.end()):
            return None
        line, self._at = self._line, start.end() + 1
        words: list[Word] = []
        while self._skip_blank():
            char = self._text[self._at]
            if char == ")":
                self._at += 1
                break
            if char in _ENDS:
                self._line += char == "\n"
                self._at += 1
                continue
            words.append(self.word())
        return Assignment(start[1], words, start[2] == "+", line)

    def word(self, ends: frozenset[str] = _ENDS) -> Word:
        """Read one word up to one of `ends`."""
        parts: list[Part] = []
        line = self._line
        while self._at < len(self._text) and self._text[self._at] not in ends:
            char = self._text[self._at]
            if char == "\\":
                self._escaped(parts)
            elif char == "'":
                parts.append(Part(self._until("'"), "literal"))
            elif char == '"':
                self._at += 1
                self._double_quoted(parts)
            elif char in "$`":
                self._expansion(parts, "bare")
            else:
                parts.append(Part(char, "bare"))
                self._at += 1
                self._line += char == "\n"
        return Word(_joined(parts), line)

    def _escaped(self, parts: list[Part]) -> None:
        char = self._text[self._at + 1 : self._at + 2]
        self._at += 2
        if char == "\n":
            self._line += 1
        else:
            parts.append(Part(char, "literal"))

    def _until(self, mark: str) -> str:
        """Return what stands between two marks and move behind the second."""
        end = self._text.find(mark, self._at + 1)
        end = len(self._text) if end < 0 else end
        text = self._text[self._at + 1 : end]
        self._at = end + 1
        self._line += text.count("\n")
        return text

    def _double_quoted(self, parts: list[Part]) -> None:
        # An empty text is a word too.
        parts.append(Part("", "quoted"))
        while self._at < len(self._text) and self._text[self._at] != '"':
            char = self._text[self._at]
            if char == "\\" and self._text[self._at + 1 : self._at + 2] in ("$", "`", '"', "\\", "\n"):
                self._escaped(parts)
            elif char in "$`":
                self._expansion(parts, "quoted")
            else:
                parts.append(Part(char, "literal"))
                self._at += 1
                self._line += char == "\n"
        self._at += 1

    def _expansion(self, parts: list[Part], kind: Literal["quoted", "bare"]) -> None:
        """Take a whole `$NAME`, `${…}`, `$(…)` or `` `…` ``."""
        start = self._at
        if self._text[start] == "`":
            self._until("`")
        elif self._text.startswith(("$(", "${"), start):
            self._at += 1
            self._balanced()
        else:
            name = _NAME.match(self._text, start)
            self._at = name.end() if name else start + 1
        text = self._text[start : self._at]
        parts.append(Part(text, kind if len(text) > 1 else "literal"))

    def _balanced(self) -> None:
        """Move behind the bracket that closes the one here; quotes hide brackets."""
        depth = 0
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "'":
                self._until("'")
                continue
            depth += (char in "({") - (char in ")}")
            self._line += char == "\n"
            self._at += 2 if char == "\\" else 1
            if depth == 0:
                return


def _joined(parts: list[Part]) -> list[Part]:
    """Join neighbours that were written in the same way; an expansion stays by itself."""
    found: list[Part] = []
    for part in parts:
        last = found[-1] if found else None
        mergeable = last is not None and last.kind == part.kind and "$" not in last.text + part.text
        if mergeable and last is not None and "`" not in last.text + part.text:
            found[-1] = Part(last.text + part.text, part.kind)
        else:
            found.append(part)
    return found


def _in_test(before: list[Token]) -> bool:
    """Say whether a `[[` is open: operators in it are not between commands."""
    for token in reversed(before):
        if isinstance(token, Word) and token.plain in ("[[", "]]"):
            return token.plain == "[["
        if isinstance(token, Operator):
            return False
    return False
