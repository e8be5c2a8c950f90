"""The words that a launch script gives to `train.py`, found without running the script.

Conditions are decided as with an empty environment and no arguments; where that does not decide them, where a loop or
a function stands, and where a sourced file is missing, a note says what was not followed.
"""

from __future__ import annotations

import os.path
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from miles_api.errors import DataError
from miles_api.migrate.lexer import Assignment, Operator, Token, Word, tokens
from miles_api.migrate.variables import Argument, Variables

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["Script", "read_script"]

_TRAIN = re.compile(r"(.*/)?train(_\w+)?\.py")
_RUNNERS = re.compile(r"(.*/)?(python[\d.]*|torchrun|uv|accelerate)")
_ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=")
_DECLARES = ("export", "declare", "local", "readonly", "typeset")
_OPENS = {"for": "done", "while": "done", "until": "done", "case": "esac", "{": "}"}
_PASSED = ("do", "!", "time", "{", "}")
_SEPARATORS = ("\n", ";", ";;", "&", "|", "&&", "||", "(", ")")
_COMPARED = 3


class Script(msgspec.Struct):
    """What was found in a launch script."""

    name: str
    arguments: list[Argument] = []
    """Everything behind `train.py`, in order."""
    program: str = ""
    """`train.py` or `train_async.py`; empty for a bare list of arguments."""
    notes: list[str] = []
    """What was not followed."""


def read_script(path: str) -> Script:
    """Read a launch script, or a file that is a list of arguments; `-` is stdin.

    Raises `DataError` for a file that cannot be read, or that launches nothing known here.
    """
    if path == "-":
        return _read(sys.stdin.read(), Path("stdin").absolute())
    if path.endswith(".py"):
        raise DataError(f"{path} is Python; run it so that it prints its command, and migrate that")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return _read(text, Path(path).resolve())


def _read(text: str, path: Path) -> Script:
    script = Script(path.name)
    reader = _Reader(script, Variables(path))
    reader.read(tokens(text))
    if not script.program:
        words = [token for token in tokens(text) if not isinstance(token, Operator)]
        if not words or not isinstance(words[0], Word) or not words[0].plain.startswith("--"):
            raise DataError(f"{path.name} starts no train.py or train_async.py, and is no list of arguments either")
        script.arguments = [one for word in words if isinstance(word, Word) for one in reader.variables.expand(word)]
    for array, line in reader.variables.unset_arrays.items():
        shape = " (the model's shape stands in config.json)" if array == "MODEL_ARGS" else ""
        script.notes.append(f"line {line}: {array} is set nowhere that could be read, its flags are missing{shape}")
    return script


class _Block(msgspec.Struct):
    """An `if`, a loop, a `case` or a function that is open."""

    end: str
    active: bool
    """Whether its commands count."""
    decided: bool = True
    """Whether a branch of the `if` was taken already."""
    testing: bool = False
    """Whether the condition is being read."""
    verdict: bool | None = None
    why: str = ""
    """Why its commands are left out although the script may run them."""


class _Reader:
    """Goes through the commands of a script and notes variables and the launch."""

    def __init__(self, script: Script, variables: Variables, file: str = "") -> None:
        self.variables = variables
        self._script = script
        self._file = file
        self._blocks: list[_Block] = []
        self._skip_next = False
        self._joint = ""

    def read(self, stream: Iterable[Token]) -> None:
        """Read all commands."""
        command: list[Word | Assignment] = []
        function = ""
        for token in [*stream, Operator("\n", 0)]:
            if not isinstance(token, Operator):
                if function == ")" and isinstance(token, Word) and token.plain == "{":
                    self._blocks.append(_Block("}", active=False, why="in a function"))
                    function = ""
                    continue
                command.append(token)
                continue
            if token.text == "(" and len(command) == 1:
                function = command[0].plain if isinstance(command[0], Word) else ""
                command = [] if function else command
                continue
            if function and token.text in (")", "\n"):
                function = ")"
                continue
            function = ""
            if command and token.text in _SEPARATORS:
                self._command(command, token.text)
                command = []

    @property
    def _active(self) -> bool:
        return all(block.active for block in self._blocks)

    def _command(self, command: list[Word | Assignment], separator: str) -> None:
        command = self._keywords(command)
        if not command:
            return
        block = self._blocks[-1] if self._blocks else None
        if block is not None and block.testing:
            block.verdict = _both(block.verdict, self._test(command), self._joint)
            self._joint = separator
            return
        skip, self._skip_next = self._skip_next, False
        if not self._active:
            self._note_left_out(command)
            return
        if separator in ("&&", "||"):
            verdict = self._test(command) if _is_test(command) else separator == "&&"
            self._skip_next = skip or verdict is not (separator == "&&")
        if not skip:
            self._run(command)

    def _note_left_out(self, command: list[Word | Assignment]) -> None:
        why = next((block.why for block in self._blocks if not block.active), "")
        for token in command:
            if isinstance(token, Assignment):
                self.variables.left_out.add(token.name)
                if why and any(word.plain.startswith("--") for word in token.words):
                    self._script.notes.append(f"line {token.line}: flags in {token.name} {why} are left out")

    def _keywords(self, command: list[Word | Assignment]) -> list[Word | Assignment]:
        """Open and close blocks by the words a command begins with; return the rest of it."""
        while command and isinstance(command[0], Word):
            word = command[0].plain
            if self._blocks and word == self._blocks[-1].end:
                self._blocks.pop()
                return []
            if word == "if":
                self._blocks.append(_Block("fi", active=self._active, decided=False, testing=True))
                self._joint = ""
            elif word in ("elif", "else", "then") and self._blocks and self._blocks[-1].end == "fi":
                self._branch(word)
            elif word in _OPENS and word != "{":
                self._blocks.append(_Block(_OPENS[word], active=False, why="in a loop or case"))
                return []
            elif word not in ("do", "!", "time", "{", "}") or (
                word == "!" and self._blocks and self._blocks[-1].testing
            ):
                break
            command = command[1:]
        return command

    def _branch(self, word: str) -> None:
        block = self._blocks[-1]
        if word == "then":
            block.testing = False
            block.active = block.verdict is True and not block.decided
            # A condition that cannot be known leaves out all branches.
            block.decided = block.decided or block.verdict is not False
            block.why = "under a condition that only the running script can decide" if block.verdict is None else ""
            return
        block.active = False
        if word == "elif":
            block.testing, block.verdict, self._joint = True, None, ""
        elif not block.decided:
            block.active = True

    def _test(self, command: list[Word | Assignment]) -> bool | None:
        """Decide a condition; None if it cannot be known."""
        words = [word for word in command if isinstance(word, Word)]
        if words and words[0].plain == "!":
            verdict = self._test([*words[1:]])
            return None if verdict is None else not verdict
        if not words or words[0].plain not in ("[", "[[", "test"):
            return None
        return self._joined_tests([word for word in words[1:] if word.plain not in ("]", "]]")])

    def _joined_tests(self, words: list[Word]) -> bool | None:
        for at, word in enumerate(words):
            if word.plain in ("&&", "||"):
                return _both(self._one_test(words[:at]), self._joined_tests(words[at + 1 :]), word.plain)
        return self._one_test(words)

    def _one_test(self, words: list[Word]) -> bool | None:
        if words and words[0].plain == "!":
            verdict = self._one_test(words[1:])
            return None if verdict is None else not verdict
        texts = [self.variables.text(word) for word in words]
        known = [text for text in texts if text is not None]
        if len(known) < len(texts) or not known:
            return None
        if known[0] in ("-n", "-z") and len(known) <= 2:  # noqa: PLR2004  the option and its text
            return bool("".join(known[1:])) is (known[0] == "-n")
        if len(known) == _COMPARED and known[1] in ("=", "==", "-eq", "!=", "-ne"):
            return (known[0] == known[2]) is (known[1] in ("=", "==", "-eq"))
        return None if known[0].startswith("-") or len(known) > 1 else bool(known[0])

    def _run(self, command: list[Word | Assignment]) -> None:
        if isinstance(command[0], Word) and command[0].plain in _DECLARES:
            command = command[1:]
        at = 0
        while at < len(command) and self._is_assignment(command[at]):
            at += 1
        if at < len(command):
            self._external([word for word in command[at:] if isinstance(word, Word)])
            return
        for token in command:
            self._assign(token)

    @staticmethod
    def _is_assignment(token: Word | Assignment) -> bool:
        return isinstance(token, Assignment) or (
            bool(token.parts) and token.parts[0].kind == "bare" and _ASSIGNMENT.match(token.plain) is not None
        )

    def _assign(self, token: Word | Assignment) -> None:
        if isinstance(token, Assignment):
            self.variables.set_array(token.name, token.words, self._file, append=token.append)
            return
        first = token.parts[0]
        name, _, rest = first.text.partition("=")
        value = Word([msgspec.structs.replace(first, text=rest), *token.parts[1:]], token.line)
        self.variables.set_text(name, value)

    def _external(self, words: list[Word]) -> None:
        """Look at a command that is not the shell's own: is it the launch, or a file to read on in?"""
        if not words:
            return
        if words[0].plain in ("source", "."):
            self._source(words[1:])
            return
        arguments = [one for word in words for one in self.variables.expand(word, self._file)]
        for at, argument in enumerate(arguments):
            runs = at == 0 or any(_RUNNERS.fullmatch(before.text) for before in arguments[:at])
            if runs and _TRAIN.fullmatch(argument.text):
                self._launch(argument, arguments[at + 1 :])
                return

    def _launch(self, program: Argument, arguments: list[Argument]) -> None:
        if self._script.program:
            self._script.notes.append(f"{program.place}: a second launch of {program.text} is left out")
            return
        self._script.program = Path(program.text).name
        self._script.arguments = arguments

    def _source(self, words: list[Word]) -> None:
        found = self.variables.expand(words[0], self._file) if words else []
        if not found:
            return
        path = Path(os.path.normpath(found[0].text))
        if found[0].unknown or not path.is_file():
            self._script.notes.append(f"{found[0].place}: {path} is not here: what it sets is not known")
            return
        _Reader(self._script, self.variables, path.name).read(tokens(path.read_text(encoding="utf-8")))


def _is_test(command: list[Word | Assignment]) -> bool:
    first = command[0]
    return isinstance(first, Word) and first.plain in ("[", "[[", "test", "!")


def _both(first: bool | None, second: bool | None, joint: str) -> bool | None:
    """Join two verdicts of which either may be unknown; without `&&` or `||` the second counts."""
    if joint == "&&":
        return False if first is False or second is False else None if None in (first, second) else True
    if joint == "||":
        return True if first or second else None if None in (first, second) else False
    return second
