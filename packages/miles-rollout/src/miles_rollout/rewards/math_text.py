"""Answers as text: the normalisations by which the established graders of MATH tell equal answers.

`hendrycks` is that of the MATH release (arXiv 2103.03874), `prm` that of PRM800K (arXiv 2305.20050), which DeepScaleR
took over. Both are pure text: no library, microseconds.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from miles_api.errors import DataError
from miles_rollout.rewards.boxes import last_boxed

__all__ = [
    "accepted_answers",
    "as_integer",
    "check_answers",
    "hendrycks",
    "is_integer",
    "latex_as_text",
    "prm",
    "same_text",
    "without_thousands",
]

_TEXT = re.compile(r"\\text\{(.+?)\}$")

_NOISE = re.compile(r"\n|\\!|\\left|\\right|\^\{\\circ\}|\^\\circ|\\\$")
_TWO_BARE = re.compile(r"\\frac([^{])([^{])")
_ONE_BARE = re.compile(r"\\frac([^{])\{")
_BARE_ROOT = re.compile(r"\\sqrt([^{])")
_SLASH = re.compile(r"(-?(?:0|[1-9]\d*))/(-?(?:0|[1-9]\d*))")
_SHORT_NAME = 2


def accepted_answers(label: Any) -> list[str]:
    """Return the answers that a label accepts, as text: one, or each of a list; a box around it is taken off.

    None and empty text accept nothing.
    """
    labels = label if isinstance(label, list) else [label]
    texts = [str(one).strip() for one in labels if one is not None]
    return [inner for text in texts if (inner := last_boxed(text) if "\\boxed" in text else text)]


def check_answers(label: Any, metadata: dict[str, Any]) -> None:
    """Raise `DataError` for a label that accepts no answer: none at all, empty text, an object."""
    if isinstance(label, dict) or not accepted_answers(label):
        raise DataError(
            f"the label {label!r:.80} is no answer (--label-key): text, a number, or a list of those that are right"
        )


def same_text(answer: str, wanted: str) -> bool:
    """Say whether two answers are the same text after either normalisation."""
    return hendrycks(answer) == hendrycks(wanted) or prm(answer) == prm(wanted) != ""


def hendrycks(text: str) -> str:
    """Return an answer without what does not matter in LaTeX: sizes, spaces, degrees, percents, units, `x =`."""
    text = _bare(text.strip()).strip()
    text = _NOISE.sub("", text).replace("\\\\", "\\").replace("tfrac", "frac").replace("dfrac", "frac")
    # Units are set as `\text{ cm}`, with a space in front.
    text = text.partition("\\text{ ")[0].replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    name, equals, rest = text.partition("=")
    if equals and "=" not in rest and len(name) <= _SHORT_NAME:
        text = rest
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    text = _ONE_BARE.sub(r"\\frac{\1}{", _TWO_BARE.sub(r"\\frac{\1}{\2}", text))
    return "\\frac{1}{2}" if text == "0.5" else _SLASH.sub(r"\\frac{\1}{\2}", text) if _SLASH.fullmatch(text) else text


_UNIT_NAMES = (
    "degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week", "month", "year",
    "foot", "feet", "inch", "yard",
)  # fmt: skip
_UNITS = re.compile(rf"(?:{'|'.join(_UNIT_NAMES)})(?:es)?s? *(?:\^[0-9]+)?")
_DEGREES = re.compile(r"\^ *\\circ")
_POWERS = {"trillion": "*10^12", "billion": "*10^9", "million": "*10^6"}
_MIXED = re.compile(r"([0-9]) +(?=[0-9])")
_WHOLE = re.compile(r"[-+]?\d{1,400}(?:\.0*)?")
_THOUSANDS = re.compile(r"(\d),(?=\d\d\d(?:$|\D))")


def prm(text: str) -> str:
    """Return an answer as plain text in lower case: no LaTeX, units, dollars or percents; `7 3/4` is `7+3/4`."""
    text = _bare(text).replace("\\%", "").replace("\\$", "").replace("$", "").replace("%", "")
    text = text.replace(" or ", " , ").replace(" and ", " , ")
    for name, power in _POWERS.items():
        text = text.replace(name, power)
    text = _DEGREES.sub("", _UNITS.sub("", text))
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    text = as_integer(re.sub(r",\\! *", "", text))
    text = latex_as_text(text)
    text = _MIXED.sub(r"\1+", re.sub("- *", "-", text))
    text = text.replace(" ", "").replace("{", "").replace("}", "").lower()
    return as_integer(text)


def is_integer(text: str) -> bool:
    """Say whether text is an integer, `3.0` and `1,000` included."""
    return _WHOLE.fullmatch(without_thousands(text)) is not None


def without_thousands(text: str) -> str:
    """Return text without the commas of `1,234,567`; those of tuples stay."""
    return _THOUSANDS.sub(r"\1", text)


def as_integer(text: str) -> str:
    """Return an integer in its shortest form, and other text as it is."""
    plain = without_thousands(text.strip())
    return str(int(plain.partition(".")[0])) if _WHOLE.fullmatch(plain) else text


def _bare(text: str) -> str:
    """Take a `\\text{…}` off that encloses everything."""
    found = _TEXT.match(text)
    return found.group(1) if found else text


_COMMAND = re.compile(r"\\([a-zA-Z]+|.)", re.DOTALL)
_GROUPED = re.compile(r"\\(?:text|mathrm|mbox|mathbf|textbf|operatorname)\s*\{([^{}]*)\}")
_INNERMOST_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_INNERMOST_ROOT = re.compile(r"\\sqrt\s*(\[[^\[\]]*\])?\s*\{([^{}]*)\}")
_SHORT_FRACTION = re.compile(r"\\[dt]?frac\s*([0-9a-z])\s*([0-9a-z])")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([0-9a-z])")
_POWER = re.compile(r"\^\s*\{([^{}]*)\}")
_ATOM = re.compile(r"-?(?:[0-9.]+|[a-z]|pi|sqrt\([^()]*\))", re.IGNORECASE)
_PLAIN = re.compile(r"[0-9]+|[a-zA-Z]")
_NAMED = {
    "pi": "pi", "infty": "inf", "cup": "U", "cdot": "*", "times": "*", "left": "", "right": "", "le": "≤", "leq": "≤",
    "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "pm": "±", "in": "∈", "cap": "∩", "circ": "°",
    "quad": " ", "qquad": " ", ",": " ", ";": " ", ":": " ", "!": "", "(": "", ")": "", "[": "", "]": "",
}  # fmt: skip


def latex_as_text(text: str) -> str:
    """Return LaTeX as one would type it: `\\frac{x+1}{2}` is `(x+1)/2`, `\\sqrt2` is `sqrt(2)`, `\\pi` is `pi`."""
    if "\\" not in text and "^" not in text:
        return text
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", _SHORT_FRACTION.sub(r"\\frac{\1}{\2}", text))
    # From the inside out; an answer with more levels than this is compared with braces in it.
    for _ in range(_LEVELS):
        before = text
        text = _GROUPED.sub(r" \1", text)
        text = _POWER.sub(lambda m: "^" + (m[1] if _PLAIN.fullmatch(m[1]) else f"({m[1]})"), text)
        text = _INNERMOST_ROOT.sub(lambda m: f" sqrt{m[1] or ''}({m[2].strip()})", text)
        text = _INNERMOST_FRACTION.sub(lambda m: f" {_operand(m[1])}/{_operand(m[2])}", text)
        if text == before:
            break
    return _COMMAND.sub(_command, text).strip()


_LEVELS = 20


def _operand(text: str) -> str:
    text = text.strip()
    return text if _ATOM.fullmatch(text) else f"({text})"


def _command(found: re.Match[str]) -> str:
    name = found.group(1)
    if name in _NAMED:
        return _NAMED[name]
    kind = "CAPITAL" if name[0].isupper() else "SMALL"
    try:
        return unicodedata.lookup(f"GREEK {kind} LETTER {name.upper()}")
    except KeyError:
        return name
