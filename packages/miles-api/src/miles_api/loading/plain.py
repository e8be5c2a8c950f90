"""What a hook left in a sample, turned into the plain values that others read: no NumPy, no torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError

if TYPE_CHECKING:
    from miles_api.sample import Sample

__all__ = ["make_plain", "plain_number"]

_LISTS = (("tokens", int), ("loss_mask", int), ("rollout_log_probs", float), ("teacher_log_probs", float))
_SCALARS = (
    ("response_length", int), ("remove_sample", bool), ("non_generation_time", float), ("index", int),
    ("group_index", int), ("rollout_id", int),
)  # fmt: skip
_WORDS = {int: "whole numbers", float: "numbers", bool: "truth values"}
_PLAIN = frozenset((str, int, float, bool, type(None), dict, list, tuple))


def make_plain(sample: Sample, who: str) -> None:
    """Turn NumPy and torch scalars and 1-D arrays in the sample's own fields into plain values, in place.

    Called after each hook that may have written to a sample; `who` names it. Raises `HookResultError` naming `who`,
    sample and field for what cannot be turned: an array of two dimensions, text among the `tokens`.

    Cheap where nothing needs it, and so not a proof: of a list only the first and the last element are looked at. What
    hides between plain elements is met by those who read all of them, the wire and the columns. A list that is turned
    is turned whole. In `metadata`, `train_metadata` and attributes of the user's own, values are turned one level deep,
    and what is no scalar or 1-D array is left alone. Numbers are not checked to be finite; `Sample.validate` does that.
    """
    for field, kind in _LISTS:
        value = getattr(sample, field)
        if value is None or (type(value) is list and (not value or type(value[0]) is type(value[-1]) is kind)):
            continue
        setattr(sample, field, _list(value, kind, who, sample, field))
    for field, kind in _SCALARS:
        value = getattr(sample, field)
        if type(value) is not kind and value is not None:
            setattr(sample, field, _scalar(value, kind, who, sample, field))
    if type(sample.reward) is not float and sample.reward is not None:
        sample.reward = _reward(sample.reward, who, sample)
    for values in (sample.metadata, sample.train_metadata, sample.__dict__):
        if values:
            _turn_values(values)


def plain_number(value: Any, who: str, what: str) -> float:
    """Return one finite number as a float; NumPy and torch scalars, booleans and one-element arrays are numbers too.

    Raises `HookResultError`: "`who` returned … as `what`".
    """
    number = _item(value)
    if not isinstance(number, int | float) or not math.isfinite(number):
        raise HookResultError(f"{who} returned {value!r} as {what}, not a finite number")
    return float(number)


def _list(value: Any, kind: type, who: str, sample: Sample, field: str) -> list[Any]:
    try:
        if hasattr(value, "tolist"):
            if getattr(value, "ndim", 1) != 1:
                raise ValueError("not 1-D")
            value = value.tolist()
        elif not isinstance(value, list | tuple | range):
            raise TypeError("not a list")
        return [_converted(_item(part), kind) for part in value]
    except (TypeError, ValueError) as error:
        left = _left(who, sample, field, value)
        raise HookResultError(f"{left}, not a list of {_WORDS[kind]}: {error}") from error


def _scalar(value: Any, kind: type, who: str, sample: Sample, field: str) -> Any:
    try:
        return _converted(_item(value), kind)
    except (TypeError, ValueError) as error:
        raise HookResultError(f"{_left(who, sample, field, value)}, not one of the {_WORDS[kind]}") from error


def _reward(value: Any, who: str, sample: Sample) -> float | dict[str, float]:
    if type(value) is not dict:
        return _scalar(value, float, who, sample, "reward")
    return {str(name): _scalar(part, float, who, sample, "reward") for name, part in value.items()}


def _item(value: Any) -> Any:
    """Return the Python number in a NumPy or torch scalar or one-element array, other things as they are."""
    if type(value) in _PLAIN or not hasattr(value, "item"):
        return value
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):
        return value


def _converted(value: Any, kind: type) -> Any:
    """Convert a number without changing it; text is not a number, 1.5 is no whole one and 2 no truth value."""
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    made = kind(value)
    if made != value and not (kind is float and value != value):  # noqa: PLR0124  NaN
        raise ValueError(f"{value!r} is not among the {_WORDS[kind]}")
    return made


def _left(who: str, sample: Sample, field: str, value: Any) -> str:
    shape = getattr(value, "shape", None)
    shown = f"{type(value).__name__} of shape {tuple(shape)}" if shape else f"{value!r:.80}"
    return f"{who} left {field} of sample {sample.index} as {shown}"


def _turn_values(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if type(value) in _PLAIN or getattr(value, "ndim", None) not in (0, 1):
            continue
        if hasattr(value, "tolist"):
            # Replacing a value does not disturb the loop; adding a key would.
            values[key] = value.tolist()
