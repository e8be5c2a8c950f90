"""Values as they were written, on the command line or in a TOML file, and what they become."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import msgspec

from miles_api.errors import did_you_mean
from miles_api.hook_options import specs_by_field
from miles_api.options import OptionKind, flag_of, option_kind, own_fields
from miles_api.parsing.flags import UNSET

__all__ = ["COMMAND_LINE", "Given", "convert", "explain", "locate", "references"]

COMMAND_LINE = "command line"


class Given(msgspec.Struct):
    """A raw value and where it was written."""

    value: Any
    source: str
    folder: Path | None = None
    """The TOML file's folder; None on the command line."""


def convert(kind: type[msgspec.Struct], given: dict[str, Given], problems: list[str]) -> dict[str, Any]:
    """Convert the fields of one group, collecting a problem for each that does not fit."""
    values: dict[str, Any] = {}
    hook_fields = specs_by_field()
    for info in own_fields(kind):
        item = given.get(info.name)
        shape = option_kind(info.type)
        if item is None:
            if shape.path == "output" and isinstance(info.default, str):
                values[info.name] = str(Path(info.default).resolve())
            continue
        try:
            if info.name in hook_fields:
                values[info.name] = _hook_value(item, hook_fields[info.name][0].many)
            else:
                value = _option_value(item, shape, info.type)
                _refuse_non_finite(value, info.default)
                values[info.name] = value
        except (msgspec.ValidationError, ValueError) as error:
            problems.append(explain(info.name, item, error, shape.base if isinstance(shape.base, tuple) else ()))
    return values


def references(value: Any) -> list[str]:
    """Split references; what is no text at all is refused where values are converted."""
    parts = value if isinstance(value, list) else [value]
    return [piece.strip() for part in parts if isinstance(part, str) for piece in part.split(",") if piece.strip()]


def locate(reference: str, folder: Path | None) -> str:
    """Make a file reference absolute: beside the TOML file that names it, or below the current directory."""
    path, mark, attribute = reference.rpartition(":")
    if not mark or not path.endswith(".py"):
        return reference
    return str(((folder or Path.cwd()) / Path(path).expanduser()).resolve()) + mark + attribute


def explain(name: str, item: Given, error: Exception, choices: tuple[Any, ...] = ()) -> str:
    """Say which value does not fit, where it was written, why, and the nearest choice."""
    shown = flag_of(name) if item.source == COMMAND_LINE else f"{item.source}: {name}"
    text = f"{shown} = {item.value!r}: {str(error).partition(' - at')[0]}"
    if choices:
        text += f"; choose from {', '.join(map(str, choices))}{did_you_mean(str(item.value), map(str, choices))}"
    return text


def _hook_value(item: Given, many: bool) -> Any:
    """Return one reference as text and several as a list; the same one twice would run twice, which nobody means."""
    parts = item.value if isinstance(item.value, list) else [item.value]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError("Expected `str`, the name of a hook")
    located = [locate(reference, item.folder) for reference in references(item.value)]
    if len(located) > 1 and not many:
        raise ValueError("takes one reference")
    twice = next((reference for i, reference in enumerate(located) if reference in located[:i]), None)
    if twice is not None:
        raise ValueError(f"names {twice} twice")
    return located[0] if len(located) == 1 else located or None


def _option_value(item: Given, shape: OptionKind, annotation: Any) -> Any:
    # A file of that name is `./null`.
    if item.value == UNSET and shape.optional:
        return None
    return _path(msgspec.convert(_raw(item, shape), annotation, strict=False), shape, item)


def _refuse_non_finite(value: Any, default: Any) -> None:
    # Bounds let infinity pass, and nan compares with none. A default of a hook's own reads back from `config.toml`.
    if isinstance(value, float) and not math.isfinite(value) and value != default:
        raise ValueError("Expected a finite number")


def _raw(item: Given, shape: OptionKind) -> Any:
    if item.source == COMMAND_LINE and shape.base is dict:
        return _object(item.value)
    # Numbers and booleans in a TOML file are typed already: a quoted one is a mistake worth naming.
    quoted = item.source != COMMAND_LINE and isinstance(item.value, str)
    if quoted and shape.base in (int, float, bool):
        raise ValueError(f"Expected `{shape.base.__name__}`, got a quoted string")
    if shape.base is bool and not isinstance(item.value, bool):
        raise ValueError(f"Expected `bool`, got `{type(item.value).__name__}`")
    return item.value


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError("""Expected an object in JSON, quoted for the shell: '{"name": 1}'""") from error


def _path(value: Any, shape: OptionKind, item: Given) -> Any:
    if shape.path == "references":
        return {locate(key, item.folder): number for key, number in value.items()}
    if not shape.path or not isinstance(value, str):
        return value
    if not value.strip():
        raise ValueError("Expected a path, not an empty one")
    located = (item.folder or Path.cwd()) / Path(value).expanduser()
    # A name that is no file here may be a name on a model hub.
    return str(located.resolve()) if shape.path == "output" or located.exists() else value
