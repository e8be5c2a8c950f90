"""What `code_execution` compares: the program in a response, the tests in a label, and what programs print."""

from __future__ import annotations

import json
import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.sample import Sample

__all__ = ["Case", "cases_of", "program_in"]

_OPENED = re.compile(r"[ \t]*```[ \t]*([\w+-]*)")
_PYTHON = ("", "python", "python3", "py")
_FORMS = (
    "expected {'inputs': […], 'outputs': […]} (with 'fn_name' for calls), {'asserts': […]}, a list of assertions, or a "
    "list of {'input': …, 'output': …}"
)


def program_in(response: str) -> str | None:
    """Return the last fenced block of Python after the last `</think>`; without any fence, all of it; None if empty."""
    answer = response.rpartition("</think>")[2]
    blocks = [block for language, block in _fenced(answer) if language in _PYTHON]
    program = blocks[-1] if blocks else "" if "```" in answer else answer
    return program if program.strip() else None


def _fenced(text: str) -> Iterator[tuple[str, str]]:
    """Yield the language and the lines of each closed block: one pass, whatever a model repeats."""
    language, block = None, []
    for line in text.split("\n"):
        if language is None:
            if found := _OPENED.match(line):
                language, block = found[1].lower(), []
        elif line.strip(" \t") == "```":
            yield language, "".join(block)
            language = None
        else:
            block.append(f"{line}\n")


class Case(msgspec.Struct, frozen=True):
    """One case, and what has to come of it. The expected value never enters the sandbox."""

    case: dict[str, Any]
    expected: Any = None

    def passed(self, stdout: str, result: str) -> bool:
        """Say whether a program that ended without an error gave what was expected."""
        if self.case["kind"] == "stdin":
            return _same_text(stdout, str(self.expected))
        if self.case["kind"] == "assert":
            return result == "ok"
        try:
            value = json.loads(result)
        except (ValueError, RecursionError):
            # It may have written anything there, such as brackets deeper than a parser goes.
            return False
        return _same_value(value, self.expected)


def cases_of(sample: Sample) -> list[Case]:
    """Return the tests in a sample's label; raise `DataError` where no program could be right."""
    label = sample.label
    if isinstance(label, str):
        try:
            label = json.loads(label)
        except ValueError:
            label = [label]
    try:
        found = _tests(label, sample.metadata)
    except (KeyError, TypeError, ValueError) as error:
        raise _unfit(sample, f"{type(error).__name__}: {error}") from error
    if not found:
        raise _unfit(sample, "there is no test in it")
    return found


def _tests(label: Any, metadata: dict[str, Any]) -> list[Case]:
    if isinstance(label, list) and label and all(isinstance(item, dict) for item in label):
        name = metadata.get("fn_name") or metadata.get("func_name")
        return [_example(item["input"], item["output"], name, item.get("testtype")) for item in label]
    if isinstance(label, list):
        label = {"asserts": label}
    if "asserts" in label:
        asserts = label["asserts"] if isinstance(label["asserts"], list) else [label["asserts"]]
        setup = label.get("setup", "")
        return [Case({"kind": "assert", "tests": f"{setup}\n{_text(one)}"}) for one in asserts]
    name = label.get("fn_name")
    pairs = zip(label["inputs"], label["outputs"], strict=True)
    return [_example(given, expected, name, "functional" if name else "stdin") for given, expected in pairs]


def _example(given: Any, expected: Any, name: str | None, kind: str | None) -> Case:
    if kind != "functional":
        return Case({"kind": "stdin", "stdin": _lines(given)}, _lines(expected))
    if name is None:
        raise KeyError("a call needs the name of its function, 'fn_name'")
    # LiveCodeBench writes arguments as JSON, one a line, and the result as JSON.
    arguments = [json.loads(line) for line in given.splitlines()] if isinstance(given, str) else list(given)
    expected = json.loads(expected) if isinstance(given, str) else expected
    return Case({"kind": "call", "name": name, "arguments": arguments}, expected)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no assertion")
    return value


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else _plain_text(value)


def _plain_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.80} is neither text nor a list of lines")
    return value


def _same_text(printed: str, expected: str) -> bool:
    """Compare line by line, spaces at their ends and empty lines at the end aside; numbers by their value."""
    ours, theirs = ([line.split() for line in text.rstrip().split("\n")] for text in (printed, expected))
    if len(ours) != len(theirs):
        return False
    return all(
        len(a) == len(b) and all(map(_same_word, a, b)) for a, b in zip(ours, theirs, strict=True)
    )  # fmt: skip


def _same_word(a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        return Decimal(a) == Decimal(b)
    except InvalidOperation:
        return False


def _same_value(value: Any, expected: Any) -> bool:
    # APPS writes some results as a list of one.
    return value == expected or (isinstance(expected, list) and len(expected) == 1 and value == expected[0])


def _unfit(sample: Sample, why: str) -> DataError:
    return DataError(f"the label of sample {sample.index} holds no tests for code_execution ({why}): {_FORMS}")
