"""What the variables of a script hold, as far as that can be known without running it."""

from __future__ import annotations

import ast
import operator
import os.path
import re
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.migrate.lexer import Operator, Word, tokens, word_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["Argument", "Variables"]

_NAMED = re.compile(r"\$\{(\w+)(\[[@*]\])?(?:(:?[-=+?])(.*))?\}", re.DOTALL)
_OWN_PATH = ("$0", "${0}", "$BASH_SOURCE", "${BASH_SOURCE}", "${BASH_SOURCE[0]}")
_SIMPLE = re.compile(r"\$(\w+|[@*#?$!-])")
_ARITHMETIC = re.compile(r"\$\(\((.*)\)\)", re.DOTALL)
_NUMBER = re.compile(r"[\w.]+")
_OPERATIONS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


class Argument(msgspec.Struct):
    """One word of a command after expansion."""

    text: str
    line: int
    file: str = ""
    """Empty for the script itself."""
    unknown: tuple[str, ...] = ()
    """Variables of the environment and outputs of commands that are in it; they stand in `text` as written."""

    @property
    def place(self) -> str:
        """Say where it was written."""
        return f"{self.file} line {self.line}" if self.file else f"line {self.line}"


class _Value(msgspec.Struct):
    text: str
    unknown: tuple[str, ...] = ()


class Variables:
    """Texts and arrays by name. What the script does not set is taken as not set: no environment is looked at."""

    def __init__(self, script: Path) -> None:
        self._script = script
        self.unset_arrays: dict[str, int] = {}
        """Arrays that were used and set nowhere, with the line."""
        self.left_out: set[str] = set()
        """Arrays that are set where the script does not come by."""
        self._texts: dict[str, _Value] = {}
        self._arrays: dict[str, list[Argument]] = {}

    def set_text(self, name: str, word: Word) -> None:
        """Assign `NAME=word`."""
        self._texts[name] = self._whole(word)

    def set_array(self, name: str, words: list[Word], file: str, *, append: bool) -> None:
        """Assign `NAME=(words)`, or append to it."""
        before = self._arrays.get(name, []) if append else []
        self._arrays[name] = [*before, *(argument for word in words for argument in self.expand(word, file))]

    def expand(self, word: Word, file: str = "") -> list[Argument]:
        """Return the arguments that a word becomes: none, one or several."""
        nothing = [Argument("", word.line, file)]
        found, arrays = nothing, False
        for part in word.parts:
            array = _NAMED.fullmatch(part.text) if part.kind != "literal" else None
            if array and array[2]:
                arrays = True
                found = _appended(found, self._array(array[1], word.line, quoted=part.kind == "quoted"))
                continue
            value = _Value(part.text) if part.kind == "literal" else self._part(part.text, word.line)
            splits = part.kind == "bare" and not value.unknown and "$" in part.text
            pieces = value.text.split() if splits else [value.text] if value.text else []
            found = _appended(found, [Argument(piece, word.line, file, value.unknown) for piece in pieces])
        if arrays:
            return [] if found is nothing else found
        # An empty text is a word only where it was quoted.
        quoted = any(part.kind != "bare" for part in word.parts)
        return [one for one in found if one.text or quoted]

    def text(self, word: Word) -> str | None:
        """Return a word as one text, as in a test, where what is not set is empty; None if it cannot be known."""
        value = self._whole(word, unset="")
        text = value.text
        for name in value.unknown:
            if not name.isidentifier():
                return None
            # A variable that was set from one of the environment.
            text = re.sub(rf"\$\{{{name}[^}}]*\}}|\${name}\b", "", text)
        return text

    def _whole(self, word: Word, unset: str | None = None) -> _Value:
        values = [
            _Value(part.text) if part.kind == "literal" else self._part(part.text, word.line, unset)
            for part in word.parts
        ]
        return _Value("".join(v.text for v in values), tuple(name for v in values for name in v.unknown))

    def _array(self, name: str, line: int, *, quoted: bool) -> list[Argument]:
        found = self._arrays.get(name, [])
        if name in self._texts:
            found = [Argument(self._texts[name].text, line, "", self._texts[name].unknown)]
        elif name not in self._arrays and name not in self.left_out:
            self.unset_arrays.setdefault(name, line)
        if quoted:
            return found
        # Without quotes the shell splits each member again, and the empty ones are gone.
        return [
            msgspec.structs.replace(one, text=piece)
            for one in found
            for piece in ([one.text] if one.unknown else one.text.split())
        ]

    def _part(self, text: str, line: int, unset: str | None = None) -> _Value:
        """Expand a piece that may be a variable or the output of a command."""
        if not text.startswith(("$", "`")) or len(text) == 1:
            return _Value(text)
        if text in _OWN_PATH:
            return _Value(str(self._script))
        simple, named = _SIMPLE.fullmatch(text), _NAMED.fullmatch(text)
        if simple:
            return self._named(simple[1], text, None, line, unset)
        if named and not named[2]:
            return self._named(named[1], text, (named[3], named[4]) if named[3] else None, line, unset)
        return self._computed(text)

    def _named(self, name: str, text: str, otherwise: tuple[str, str] | None, line: int, unset: str | None) -> _Value:
        if not name[0].isalpha() and name[0] != "_":
            # `$1`, `$@` …: as if the script was called without arguments.
            known = _Value("0") if name == "#" else None
            unset = ""
        else:
            known = self._texts.get(name)
        if otherwise and otherwise[0].endswith("+"):
            return self._whole(word_of(otherwise[1], line), unset) if known and known.text else _Value("")
        if known is not None and (known.text or not (otherwise and otherwise[0].startswith(":"))):
            return known
        if otherwise and not otherwise[0].endswith("?"):
            value = self._whole(word_of(otherwise[1], line), unset)
            if otherwise[0].endswith("="):
                self._texts[name] = value
            return value
        return _Value(text, (name,)) if unset is None else _Value(unset)

    def _computed(self, text: str) -> _Value:
        """Work out arithmetic and paths; other commands are not run."""
        arithmetic = _ARITHMETIC.fullmatch(text)
        if arithmetic:
            number = _calculated(_NUMBER.sub(lambda name: self._number(name[0]), arithmetic[1].replace("$", "")))
            return _Value(text, (text,)) if number is None else _Value(str(number))
        return self._path(text) if text.startswith("$(") else _Value(text, (text,))

    def _path(self, text: str) -> _Value:
        """Return what `basename X`, `dirname X` or `cd X && pwd` prints."""
        found = tokens(text[2:-1])
        words = [token for token in found if isinstance(token, Word) and token.plain != "--"]
        between = [token.text for token in found if isinstance(token, Operator)]
        names = [word.plain for word in words]
        if names[:1] in (["basename"], ["dirname"]) and len(words) == 2 and not between:  # noqa: PLR2004  and its path
            value = self._whole(words[1])
            part = os.path.basename if names[0] == "basename" else os.path.dirname
            return _Value(part(value.text.rstrip("/")), value.unknown)
        if names[:1] == ["cd"] and names[2:] == ["pwd"] and between == ["&&"]:
            value = self._whole(words[1])
            return _Value(os.path.normpath(value.text), value.unknown)
        return _Value(text, (text,))

    def _number(self, name: str) -> str:
        known = self._texts.get(name)
        return known.text if known and not known.unknown else name


def _appended(found: list[Argument], more: list[Argument]) -> list[Argument]:
    """Join the last argument so far with the first of `more`; the others stand by themselves."""
    if not more:
        return found
    last, first = found[-1], more[0]
    fresh = not last.text and not last.unknown
    joined = first if fresh else Argument(last.text + first.text, last.line, last.file, last.unknown + first.unknown)
    return [*found[:-1], joined, *more[1:]]


def _calculated(text: str) -> int | None:
    """Return what whole numbers with + - * / % and brackets come to; None for anything else."""
    try:
        return _evaluated(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, KeyError, ZeroDivisionError, RecursionError):
        return None


def _evaluated(node: Any) -> int:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return node.value
    if isinstance(node, ast.BinOp):
        return _OPERATIONS[type(node.op)](_evaluated(node.left), _evaluated(node.right))
    raise ValueError("not arithmetic of whole numbers")
