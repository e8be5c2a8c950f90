"""Numbers held as bytes until somebody reads them: `PackedColumn` stands for a list, `ArrayBlob` for an array.

A sample that comes over the wire keeps its token-sized columns packed. Reading `sample.tokens` makes the list, once;
a sample that nobody reads costs neither the lists nor their encoding when it travels on.
"""

from __future__ import annotations

import array
import enum
import math
import struct
import sys
import threading
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import WireError

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["ArrayBlob", "Kind", "PackedColumn", "lazy_field", "pack", "packed"]


class Kind(enum.IntEnum):
    """What the bytes of a packed column are, little-endian; the number is its msgpack extension type."""

    INT32 = 1
    INT8 = 2
    FLOAT32 = 3
    FLOAT64 = 4


_CODES: dict[int, str] = {Kind.INT32: "i", Kind.INT8: "b", Kind.FLOAT32: "f", Kind.FLOAT64: "d"}
_SIZES: dict[int, int] = {Kind.INT32: 4, Kind.INT8: 1, Kind.FLOAT32: 4, Kind.FLOAT64: 8}
_KINDS = {int(kind): kind for kind in Kind}
_UNPACK_LOCK = threading.Lock()


def pack(values: list[Any], kind: Kind) -> bytes | None:
    """Return the numbers as `kind`, or None if they do not fit it: a fraction or 2**31 as INT32, 1e39 as FLOAT32.

    FLOAT32 rounds to the nearest, as a conversion to a float32 tensor does; NaN and infinities stay what they are.
    Booleans become 0 and 1, whole numbers in a float column become floats.
    """
    try:
        if kind is Kind.INT8:
            data = bytes(values)  # twice as fast as struct, and right up to 127
            if data.isascii():
                return data
    except (TypeError, ValueError):
        pass
    try:
        return struct.pack(f"<{len(values)}{_CODES[kind]}", *values)
    except (struct.error, OverflowError, TypeError, ValueError):
        return None


class PackedColumn(enum.Enum):
    """The list of one column, packed until it is read. Built by `packed`, never by name.

    It is an `Enum` by form only: msgspec encodes the member of an enum as its value, and asks for the value when it
    encodes. So `msgspec.json.encode(sample)` sees a list, whether it was read before or not. There is no other type
    for which msgspec asks.
    """

    kind: Kind
    data: bytes | None
    """The packed numbers; None once somebody holds the list and may change it."""

    def read(self) -> list[Any]:
        """Return the list; the same object each time."""
        if self.data is not None:
            with _UNPACK_LOCK:  # two hooks in two threads must not get two lists
                if self.data is not None:
                    self._list = self._unpack(self.data)
                    self.data = None
        return self._list

    def peek(self) -> list[Any]:
        """Return the list for reading alone: the column stays packed."""
        data = self.data
        return self._list if data is None else self._unpack(data)

    def _unpack(self, data: bytes) -> list[Any]:
        if self.kind is Kind.INT8 and data.isascii():
            return list(data)
        numbers = array.array(_CODES[self.kind], data)
        if sys.byteorder == "big":
            numbers.byteswap()
        return numbers.tolist()

    def __getattr__(self, name: str) -> Any:
        if name == "_value_":
            return self.peek()
        raise AttributeError(f"a packed column has no attribute {name!r}")

    def __len__(self) -> int:
        data = self.data
        return len(self._list) if data is None else len(data) // _SIZES[self.kind]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.peek())

    def __getitem__(self, index: Any) -> Any:
        return self.peek()[index]

    def __eq__(self, other: object) -> bool:
        return self.peek() == (other.peek() if isinstance(other, PackedColumn) else other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(self.peek())

    def __deepcopy__(self, memo: Any) -> PackedColumn:
        data = self.data
        if data is not None:
            return packed(self.kind, data)
        twin = packed(self.kind, b"")
        twin._list, twin.data = self._list.copy(), None
        return twin

    def __reduce_ex__(self, proto: Any) -> tuple[Any, ...]:
        data = self.data
        return (list, (self.peek(),)) if data is None else (packed, (int(self.kind), data))


def packed(kind: int, data: bytes) -> PackedColumn:
    """Return a column of these bytes; `WireError` if they are no whole number of numbers."""
    if len(data) % _SIZES[kind]:
        raise WireError(f"{len(data)} bytes are no whole number of {Kind(kind).name.lower()} values")
    column = object.__new__(PackedColumn)
    column.kind = _KINDS[kind]
    column.data = data
    return column


def lazy_field(slot: Any) -> property:
    """Return a property over a Struct's slot that reads a packed column as its list.

    C code of msgspec reads the slot itself and meets the `PackedColumn`.
    """
    read = slot.__get__

    def get(owner: Any) -> Any:
        value = read(owner)
        return value.read() if value.__class__ is PackedColumn else value

    return property(get, slot.__set__, slot.__delete__)


_PREFIXES = {
    "?": "bool", **dict.fromkeys("bhilq", "int"), **dict.fromkeys("BHILQ", "uint"), **dict.fromkeys("efd", "float"),
}  # fmt: skip
_ITEM_BYTES = {
    "bool": 1, "int8": 1, "int16": 2, "int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8,
    "float16": 2, "float32": 4, "float64": 8,
}  # fmt: skip


class ArrayBlob(msgspec.Struct, frozen=True):
    """An array without an array library: `numpy.asarray(blob)` and `memoryview(blob.data)` read it without a copy."""

    dtype: str
    """NumPy's name: bool, int8 to int64, uint8 to uint64, float16, float32 or float64."""
    shape: tuple[int, ...]
    data: bytes
    """Row after row, little-endian."""

    def __post_init__(self) -> None:
        if self.dtype not in _ITEM_BYTES:
            raise WireError(f"an array of {self.dtype!r}: known are {', '.join(_ITEM_BYTES)}")
        count = math.prod(self.shape)
        if min(self.shape, default=0) < 0 or count * _ITEM_BYTES[self.dtype] != len(self.data):
            raise WireError(f"{len(self.data)} bytes are no {self.dtype} array of shape {self.shape}")

    @classmethod
    def of(cls, value: Any) -> ArrayBlob:
        """Copy anything with the buffer protocol, a NumPy array for one; `WireError` if its type is not listed."""
        try:
            view = memoryview(value)
        except (TypeError, ValueError) as error:
            raise WireError(f"a {type(value).__qualname__} is no array: it has no buffer protocol") from error
        prefix = _PREFIXES.get(view.format.removeprefix("<"), "")
        dtype = prefix if prefix == "bool" else f"{prefix}{8 * view.itemsize}"
        if dtype not in _ITEM_BYTES or (sys.byteorder == "big" and view.itemsize > 1):
            known = f"known are little-endian {', '.join(_ITEM_BYTES)}"
            raise WireError(f"an array of buffer format {view.format!r}: {known}")
        return cls(dtype, tuple(view.shape or ()), view.tobytes())

    def __repr__(self) -> str:
        return f"ArrayBlob({self.dtype}, {self.shape})"

    @property
    def __array_interface__(self) -> dict[str, Any]:
        typestr = f"<{self.dtype[0]}{_ITEM_BYTES[self.dtype]}"
        return {"version": 3, "shape": self.shape, "typestr": typestr, "data": self.data}
