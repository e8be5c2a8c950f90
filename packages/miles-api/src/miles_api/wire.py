"""Samples as bytes, between processes and into dumps: msgpack, with token-sized columns as packed numbers.

A sample is a map of the fields that differ from their defaults, by name:

    tokens                               extension 1: int32, little-endian
    loss_mask                            extension 2: int8
    rollout_log_probs, teacher_log_probs extension 3: float32
    rollout_routed_experts               extension 5: [dtype, shape, data] (`ArrayBlob`)
    spec_info, prefix_cache_info         a map
    extra                                a map of the attributes beyond the declared ones
    any other                            its value; extensions as in `miles_api.packing.codec`

A group is an array of samples, a fan-out an array in place of a sample. Fields that this Miles does not know are left
out when they are read, missing ones get their defaults: both sides may be of different versions.

Log-probs become float32, the precision they are computed in and trained with: a float64 that a hook put there is
rounded to the nearest, NaN and infinities stay. A column that its packed type cannot hold otherwise (a token id of
2**31, a mask of fractions, a log-prob beyond float32's range) travels as a list of numbers instead, exactly.

What was read stays packed until somebody reads the field; an untouched sample is encoded again from the same bytes.
Bytes that are no sample raise `WireError`, and nothing else; values are plain data, never code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import WireError
from miles_api.packing import codec
from miles_api.packing.packed import ArrayBlob, Kind, PackedColumn, pack
from miles_api.packing.sample_forms import COLUMNS, revived, slots
from miles_api.sample import Sample, Status

if TYPE_CHECKING:
    from miles_api.rollout_types import Group

__all__ = ["decode_groups", "decode_sample", "encode_groups", "encode_sample", "group_from", "group_message"]

_DEFAULTS = slots(Sample())
_FIELDS = _DEFAULTS.keys()
_STRUCTS = ("spec_info", "prefix_cache_info")
_SCALARS = frozenset({type(None), bool, int, float, str, Status})
_ACCEPTED = {
    Kind.INT32: {Kind.INT32, Kind.INT8}, Kind.INT8: {Kind.INT32, Kind.INT8}, Kind.FLOAT32: {Kind.FLOAT32, Kind.FLOAT64},
}  # fmt: skip
_STATUSES = {str(status): status for status in Status}


def encode_sample(sample: Sample) -> bytes:
    """Return the sample as bytes; `WireError` names sample, attribute and type of what cannot travel."""
    try:
        return codec.encode(_message(sample))
    except codec.FAILURES:
        return codec.encode_or_refuse(_message(sample, carefully=True), f"sample {sample.index}")


def decode_sample(data: bytes | memoryview) -> Sample:
    """Return the sample in `data`, its columns packed until they are read; `WireError` if it holds none."""
    return _sample(codec.decode(data, "not a sample"), "not a sample")


def encode_groups(groups: list[Group]) -> bytes:
    """Return groups, fan-outs in them included, as bytes; `WireError` as in `encode_sample`."""
    try:
        return codec.encode([group_message(group) for group in groups])
    except codec.FAILURES:
        return codec.encode_or_refuse([group_message(group, carefully=True) for group in groups], "these groups")


def decode_groups(data: bytes | memoryview) -> list[Group]:
    """Return the groups in `data`; `WireError` if it holds none."""
    message = codec.decode(data, "not groups of samples")
    if type(message) is not list:
        raise WireError(f"not groups of samples: found {type(message).__name__}")
    return [group_from(group, f"group {number}") for number, group in enumerate(message)]


def group_message(group: Group, *, carefully: bool = False) -> list[Any]:
    """Return what `codec.encode` writes for a group.

    Without `carefully` it may raise one of `codec.FAILURES`, then try again with it: every value is checked alone and a
    `WireError` names the one at fault.
    """
    return [
        [_message(one, carefully=carefully) for one in item]
        if isinstance(item, list)
        else _message(item, carefully=carefully)
        for item in group
    ]


def group_from(message: Any, where: str) -> Group:
    """Return the group of a decoded `group_message`; `WireError` naming `where` if it is none."""
    if type(message) is not list:
        raise WireError(f"{where}: found {type(message).__name__} instead of a list of samples")
    return [
        [_sample(one, f"{where}, sample {number}, part {part}") for part, one in enumerate(item)]
        if type(item) is list
        else _sample(item, f"{where}, sample {number}")
        for number, item in enumerate(message)
    ]


def _message(sample: Sample, *, carefully: bool = False) -> dict[str, Any]:
    if not isinstance(sample, Sample):
        raise WireError(f"a {type(sample).__qualname__} stands where a Sample belongs")
    who = f"sample {sample.index} (group {sample.group_index})"
    ready: dict[str, Any] = {}
    loose: dict[str, Any] = {}
    for name, value, default in zip(_FIELDS, msgspec.structs.astuple(sample), _DEFAULTS.values(), strict=True):
        if value is not default and not (type(value) is type(default) and value == default):
            (ready if type(value) in _SCALARS and not carefully else loose)[name] = value
    if ready.get("status", loose.get("status", "pending")) not in _STATUSES:
        raise WireError(f"{who}: status is {sample.status!r}, not one of {', '.join(_STATUSES)}")
    _pack_columns(loose, ready)
    _flatten(loose, who)
    if sample.__dict__:
        loose["extra"] = sample.__dict__
    if carefully or not codec.survives(loose):
        loose = {name: codec.carried(value, f"{who}: {name}") for name, value in loose.items()}
    return {**ready, **loose}


def _pack_columns(loose: dict[str, Any], ready: dict[str, Any]) -> None:
    for name, kind in COLUMNS.items():
        if name in loose:
            column = loose.pop(name)
            data = _data_of(column, kind)
            if data is not None:
                ready[name] = msgspec.msgpack.Ext(int(kind), data)
            else:
                loose[name] = list(column) if type(column) is PackedColumn else column


def _data_of(column: Any, kind: Kind) -> bytes | None:
    if type(column) is PackedColumn:
        data = column.data
        if data is not None and column.kind is kind:
            return data
        column = column.peek()
    return pack(column, kind) if type(column) is list else None


def _flatten(loose: dict[str, Any], who: str) -> None:
    for name in _STRUCTS:
        if name in loose and isinstance(loose[name], msgspec.Struct):
            loose[name] = slots(loose[name])
    name = "rollout_routed_experts"
    if name in loose and _is_array(loose[name]):
        try:
            loose[name] = ArrayBlob.of(loose[name])
        except WireError as error:
            raise WireError(f"{who}: {name} holds {error}") from error


def _is_array(value: Any) -> bool:
    if isinstance(value, bytes | bytearray | ArrayBlob):
        return False
    try:
        memoryview(value)
    except (TypeError, ValueError):
        return False
    return True


def _sample(message: Any, where: str) -> Sample:
    if type(message) is not dict:
        raise WireError(f"{where}: found {type(message).__name__} instead of a map")
    extra = message.pop("extra", None)
    fields = message if message.keys() <= _FIELDS else {key: message[key] for key in _FIELDS if key in message}
    for name, kind in COLUMNS.items():
        column = fields.get(name)
        if type(column) is PackedColumn and column.kind not in _ACCEPTED[kind]:
            raise WireError(f"{where}: {name} is packed as {column.kind.name.lower()}")
    if "status" in fields:
        fields["status"] = _status(fields["status"], where)
    for name in _STRUCTS:
        if name in fields:
            fields[name] = revived(Sample, name, fields[name])
    sample = Sample(**fields)
    if extra is not None:
        sample.__dict__.update(_attributes(extra, where))
    return sample


def _attributes(extra: Any, where: str) -> dict[str, Any]:
    if type(extra) is not dict or not all(type(key) is str for key in extra):
        raise WireError(f"{where}: extra is no map of attributes")
    return extra


def _status(value: Any, where: str) -> Status:
    try:
        return _STATUSES[value]
    except (KeyError, TypeError) as error:
        raise WireError(f"{where}: status is {value!r}, not one of {', '.join(_STATUSES)}") from error
