"""What a `Sample` becomes when it is pickled or written as JSON, and how it comes back."""

from __future__ import annotations

import copy
import functools
from typing import Any

import msgspec

from miles_api.errors import SampleError
from miles_api.packing import codec
from miles_api.packing.packed import Kind, pack, packed

__all__ = ["COLUMNS", "field_from_json", "fields_to_json", "pickled_fields", "revived", "slots"]

COLUMNS = {
    "tokens": Kind.INT32, "loss_mask": Kind.INT8, "rollout_log_probs": Kind.FLOAT32, "teacher_log_probs": Kind.FLOAT32,
}  # fmt: skip
"""The fields of a sample with one number for each token, and as what they travel."""
_EXACTLY = {**COLUMNS, "rollout_log_probs": Kind.FLOAT64, "teacher_log_probs": Kind.FLOAT64}
_WORTH_PACKING = 64

slots = msgspec.structs.asdict
"""Return the fields as they lie in the Struct: a column that nobody read is a `PackedColumn`."""


def pickled_fields(sample: msgspec.Struct) -> dict[str, Any]:
    """Return the fields with long columns packed; unlike the wire it keeps log-probs as they are, in float64."""
    fields = slots(sample)
    for name, kind in _EXACTLY.items():
        values = fields[name]
        if type(values) is list and len(values) > _WORTH_PACKING:
            data = pack(values, kind)
            fields[name] = values if data is None else packed(kind, data)
    return fields


def fields_to_json(sample: msgspec.Struct, who: str) -> dict[str, Any]:
    """Return every field as JSON holds it without loss; `WireError` starting with `who` names what it cannot."""
    try:
        text = msgspec.json.encode(sample)
        if not codec.mentions_packed(text) and msgspec.json.decode(text, type=type(sample)) == sample:
            return msgspec.json.decode(text)
    except codec.FAILURES:
        pass  # some field needs the longer way
    owner = type(sample)
    return {field: _to_json(owner, field, getattr(sample, field), f"{who}: {field}") for field in slots(sample)}


def field_from_json(owner: type[msgspec.Struct], field: str, value: Any) -> Any:
    """Return a field's value: what had to be packed as it was, anything else if it fits the field's type.

    `SampleError` names the field otherwise.
    """
    if codec.is_packed_json(value):
        return revived(owner, field, codec.from_json(value, field))
    try:
        value = msgspec.convert(value, _types(owner)[field])
    except msgspec.ValidationError as error:
        raise SampleError(f"{owner.__name__}.{field}: {error}") from error
    return value if field in COLUMNS else codec.from_json(value, field)


def revived(owner: type[msgspec.Struct], field: str, value: Any) -> Any:
    """Make the map that a Struct such as `SpecInfo` became on its way a Struct again; keys it lacks are left out."""
    kind = _types(owner)[field]
    if type(value) is not dict or not hasattr(kind, "__struct_fields__"):
        return value
    return kind(**{key: value[key] for key in kind.__struct_fields__ if key in value})


def _to_json(owner: type[msgspec.Struct], field: str, value: Any, where: str) -> Any:
    kind = _types(owner)[field]
    if type(value) is kind and isinstance(value, msgspec.Struct):
        value = slots(value)
    # A column is packed as a whole: NaN must not make each of 8,000 log-probs a map.
    plain = copy.copy(value) if field in COLUMNS else codec.to_json(value, where)
    return plain if _fits(kind, plain) else codec.packed_json(value, where)


def _fits(kind: Any, plain: Any) -> bool:
    try:
        back = msgspec.json.decode(msgspec.json.encode(plain), type=kind)
    except codec.FAILURES:
        return False
    return (slots(back) if isinstance(back, msgspec.Struct) else back) == plain


@functools.cache
def _types(owner: type[msgspec.Struct]) -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(owner)}
