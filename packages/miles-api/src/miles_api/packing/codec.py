"""Plain values to msgpack or JSON and back without loss: what does not come back equal is refused by name.

msgspec alone turns a tuple or a set into a list, a dataclass into a map, a naive datetime into a string, and in JSON
bytes into text and the keys of a dict into strings, all without a word.

Extension types of our msgpack, beside msgspec's own -1 (a time with a zone):

    1 int32   2 int8   3 float32   4 float64    numbers, little-endian, one after the other (`PackedColumn`)
    5 array         msgpack [dtype, shape, data] (`ArrayBlob`)
    16 tuple   17 set   18 frozenset            msgpack array of the members
    19 int          an integer beyond 64 bits: two's complement, little-endian
    20 str          text with halves of surrogate pairs, which UTF-8 proper cannot hold

In JSON, a value that JSON cannot hold stands as `{"$packed": "<base64 of its msgpack>"}`.
"""

from __future__ import annotations

import base64
from typing import Any

import msgspec

from miles_api.errors import WireError
from miles_api.packing.packed import ArrayBlob, Kind, packed

__all__ = [
    "FAILURES",
    "carried",
    "decode",
    "encode",
    "encode_or_refuse",
    "from_json",
    "is_packed_json",
    "mentions_packed",
    "packed_json",
    "survives",
    "to_json",
]


_ARRAY, _TUPLE, _SET, _FROZENSET, _INT, _STR = 5, 16, 17, 18, 19, 20
_CONTAINERS: dict[int, Any] = {_TUPLE: tuple, _SET: set, _FROZENSET: frozenset}
_CONTAINER_TYPES = {kind: code for code, kind in _CONTAINERS.items()}
_COLUMNS = frozenset(Kind)
_PACKED_KEY = "$packed"
_REFUSALS = (msgspec.MsgspecError, TypeError, ValueError, OverflowError)
FAILURES = (*_REFUSALS, RecursionError)
"""What msgspec raises for a value it cannot encode, or for bytes that are no message."""


def _unpack_ext(code: int, view: memoryview) -> Any:
    if code in _COLUMNS:
        return packed(code, bytes(view))
    if code == _ARRAY:
        dtype, shape, data = _decoder.decode(view)
        if type(data) is not bytes or not all(type(extent) is int for extent in shape):
            raise WireError("an array that is not [dtype, shape, data]")
        return ArrayBlob(dtype, tuple(shape), data)
    if code in _CONTAINERS:
        members = _decoder.decode(view)
        if type(members) is not list:
            raise WireError(f"a {_CONTAINERS[code].__name__} that is no array of members")
        return _CONTAINERS[code](members)
    if code == _INT:
        return int.from_bytes(view, "little", signed=True)
    if code == _STR:
        return bytes(view).decode("utf-8", "surrogatepass")
    raise WireError(f"an extension of type {code}: a newer Miles, or something else, wrote it")


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(ext_hook=_unpack_ext)
encode = _encoder.encode
"""Encode a message whose values went through `carried`; one of `FAILURES` if some did not."""


def encode_or_refuse(message: Any, what: str) -> bytes:
    """Encode a message that `carried` checked part by part; `WireError` if it is too deep or too large as a whole."""
    try:
        return encode(message)
    except FAILURES as error:
        raise WireError(f"{what} cannot travel: {error}") from error


def decode(data: Any, what: str) -> Any:
    """Return the value in `data`; `WireError` naming `what` if there is none."""
    try:
        return _decoder.decode(data)
    except (*FAILURES, MemoryError, WireError) as error:
        raise WireError(f"{what}: {str(error) or type(error).__name__}") from error


def carried(value: Any, where: str) -> Any:
    """Return a value that `encode` writes such that `decode` returns one equal to `value`.

    Mostly that is `value` itself. None, bool, int, float, str, bytes, list, tuple, set, frozenset, dict, `ArrayBlob`
    and what msgspec brings back equal can travel, nested as you like. A NumPy scalar, a member of a StrEnum or another
    subclass of str or a number becomes the plain value.
    `WireError` names the place, starting from `where`, and the type of what cannot.
    """
    try:
        if value is None or (type(value) is not ArrayBlob and survives(value)):
            return value
        return _tagged(value, where)
    except RecursionError as error:
        raise WireError(f"{where} is nested too deeply, or contains itself") from error


def survives(value: Any) -> bool:
    """Tell whether `decode(encode(value))` equals `value`; `RecursionError` if it is too deep to tell."""
    try:
        return bool(_decoder.decode(_encoder.encode(value)) == value)
    except (*_REFUSALS, WireError):
        return False


def _tagged(value: Any, where: str) -> Any:
    kind = type(value)
    if kind is list:
        return [_tagged(item, f"{where}[{position}]") for position, item in enumerate(value)]
    if isinstance(value, dict):
        return {_key(key, where): _tagged(item, f"{where}[{key!r}]") for key, item in value.items()}
    if kind in _CONTAINER_TYPES:
        members = [_tagged(item, f"{where}[…]") for item in value]
        return msgspec.msgpack.Ext(_CONTAINER_TYPES[kind], _encoder.encode(members))
    if kind is ArrayBlob:
        return msgspec.msgpack.Ext(_ARRAY, _encoder.encode([value.dtype, value.shape, value.data]))
    if kind is float or survives(value):  # NaN is not equal to itself
        return value
    return _plain_ext(value) if kind in (int, str) else _tagged(_plain_scalar(value, where), where)


def _plain_ext(value: int | str) -> msgspec.msgpack.Ext:
    if isinstance(value, str):
        return msgspec.msgpack.Ext(_STR, value.encode("utf-8", "surrogatepass"))
    return msgspec.msgpack.Ext(_INT, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))


def _plain_scalar(value: Any, where: str) -> Any:
    """Return the number or text in a NumPy or torch scalar or in a subclass of float, int or str; else `WireError`."""
    for base in (float, int, str):
        if isinstance(value, base) and type(value) is not base:
            return base(value)
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        plain = value.item()
        if type(plain) in (bool, int, float, str):
            return plain
    kind = type(value)
    raise WireError(
        f"{where} holds a {kind.__module__}.{kind.__qualname__}: what travels is None, bool, int, float, str, bytes, "
        "list, tuple, set, dict and ArrayBlob"
    )


def _key(key: Any, where: str) -> Any:
    if not survives(key):
        raise WireError(f"{where} has a key of type {type(key).__qualname__} that cannot travel")
    return key


def to_json(value: Any, where: str) -> Any:
    """Return a deep copy of `value` that JSON holds without loss; `from_json` gives the value back.

    `WireError` as in `carried`.
    """
    try:
        return _json_form(value, where)
    except RecursionError as error:
        raise WireError(f"{where} is nested too deeply, or contains itself") from error


def _json_form(value: Any, where: str) -> Any:
    try:
        text = msgspec.json.encode(value)
        plain = msgspec.json.decode(text)
        if plain == value and not mentions_packed(text):
            return plain
    except _REFUSALS:
        pass
    if isinstance(value, dict) and all(type(key) is str for key in value) and _PACKED_KEY not in value:
        return {_key(key, where): _json_form(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) is list:
        return [_json_form(item, f"{where}[{position}]") for position, item in enumerate(value)]
    return packed_json(value, where)


def packed_json(value: Any, where: str) -> dict[str, str]:
    """Return the form of a value that JSON cannot hold."""
    return {_PACKED_KEY: base64.b64encode(_encoder.encode(carried(value, where))).decode()}


def is_packed_json(value: Any) -> bool:
    """Tell whether this is what `packed_json` returns."""
    return type(value) is dict and value.keys() == {_PACKED_KEY}


def mentions_packed(text: bytes) -> bool:
    """Tell whether JSON text holds a key, or text, that could be taken for `packed_json`'s."""
    return b'"$packed"' in text


def from_json(value: Any, where: str) -> Any:
    """Return what `to_json` was given; parts without anything packed are returned as they are, not copied."""
    if is_packed_json(value):
        try:
            data = base64.b64decode(value[_PACKED_KEY], validate=True)
        except (TypeError, ValueError) as error:
            raise WireError(f"{where} is no packed value: {error}") from error
        return decode(data, where)
    if type(value) is dict:
        return {key: from_json(item, where) for key, item in value.items()}
    if type(value) is list:
        return [from_json(item, where) for item in value]
    return value
