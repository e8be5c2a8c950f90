"""What a dump holds: its header and records, and their payloads. The file around them is `miles_api.record`."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from miles_api._version import __version__
from miles_api.abi import ABI
from miles_api.errors import DataError, WireError
from miles_api.packing import codec
from miles_api.packing.packed import Kind, PackedColumn, pack, packed
from miles_api.rollout_types import Group
from miles_api.wire import group_from, group_message

__all__ = [
    "SCHEMA", "DumpHeader", "Record", "RecordedGroup", "RecordedRollout", "RecordedTrainBatch", "header_from",
    "header_payload", "record_from", "record_payload",
]  # fmt: skip

SCHEMA = 1
"""The layout of dumps that this Miles writes, and the newest that it reads."""


class DumpHeader(msgspec.Struct):
    """What a dump says about the run that wrote it."""

    schema: int = SCHEMA
    kind: Literal["rollout", "train"] = "rollout"
    """Which records follow: `RecordedRollout` or `RecordedTrainBatch`."""
    abi: tuple[int, int] = ABI
    miles_api: str = __version__
    config: dict[str, Any] = {}
    """Every option but the secret ones."""
    tokenizer: str = ""
    """Where the tokenizer was loaded from."""


class RecordedGroup(msgspec.Struct):
    """The samples of one prompt."""

    samples: Group
    dropped: str | None = None
    """The reason that a filter gave; None: it was trained on."""


class RecordedRollout(msgspec.Struct):
    """One rollout, or one evaluation."""

    rollout_id: int
    weight_version: str = ""
    evaluation: bool = False
    groups: list[RecordedGroup] = []
    raw_rewards: list[float] | None = None
    """What post-processing returned for the kept samples, in the order of conversion: by group_index, then index."""
    rewards: list[float] | None = None
    metrics: dict[str, float] = {}


class RecordedTrainBatch(msgspec.Struct):
    """What one rank trained on."""

    rollout_id: int
    columns: dict[str, Any] = {}
    """Plain lists, one entry a sample."""


Record = RecordedRollout | RecordedTrainBatch


def header_payload(header: DumpHeader) -> bytes:
    """Return the payload of a dump's first frame; `WireError` names an option that cannot be written."""
    fields = msgspec.structs.asdict(header)
    fields["config"] = codec.carried(header.config, "the dump's header: config")
    return codec.encode_or_refuse(fields, "the header of a dump")


def header_from(payload: bytes, path: str) -> DumpHeader:
    """Return the header; `DataError` naming `path` if a newer Miles wrote it or it makes no sense."""
    try:
        fields = codec.decode(payload, "it")
        if type(fields) is dict and type(fields.get("schema")) is int and fields["schema"] > SCHEMA:
            raise DataError(
                f"{path} was written by Miles {fields.get('miles_api', 'of a later version')} in dump schema "
                f"{fields['schema']}; this one reads up to {SCHEMA}: update miles-api"
            )
        return msgspec.convert(fields, DumpHeader)
    except (WireError, msgspec.ValidationError) as error:
        raise DataError(f"{path} has a header that makes no sense, although it is undamaged: {error}") from error


def record_payload(record: Record) -> bytes:
    """Return the payload of a record's frame; `WireError` names rollout, sample, attribute and type at fault."""
    try:
        return codec.encode(_message(record, carefully=False))
    except codec.FAILURES:
        return codec.encode_or_refuse(_message(record, carefully=True), f"the record of rollout {record.rollout_id}")


def _message(record: Record, *, carefully: bool) -> dict[str, Any]:
    who = f"rollout {record.rollout_id}"
    if isinstance(record, RecordedTrainBatch):
        columns = {name: _packed_column(column, f"{who}: {name}") for name, column in record.columns.items()}
        return {"type": "train", "rollout_id": record.rollout_id, "columns": columns}
    fields = msgspec.structs.asdict(record)
    fields["groups"] = [group.dropped for group in record.groups]
    message = {name: codec.carried(value, f"{who}: {name}") for name, value in fields.items()}
    message["groups"] = [
        {"samples": group_message(group.samples, carefully=carefully), "dropped": dropped}
        for group, dropped in zip(record.groups, message["groups"], strict=True)
    ]
    return {"type": "rollout", **message}


def _packed_column(column: Any, where: str) -> Any:
    if type(column) is not list:
        return codec.carried(column, where)
    return [_packed_entry(entry) or codec.carried(entry, f"{where}[{number}]") for number, entry in enumerate(column)]


def _packed_entry(values: Any) -> Any:
    """Return a list of numbers packed, in float32 only if that is exact; None for anything else."""
    kind = {int: Kind.INT32, float: Kind.FLOAT32}.get(type(values[0])) if type(values) is list and values else None
    data = None if kind is None else pack(values, kind)
    if kind is Kind.FLOAT32 and (data is None or packed(kind, data) != values):
        kind = Kind.FLOAT64
        data = pack(values, kind)
    return None if kind is None or data is None else msgspec.msgpack.Ext(int(kind), data)


def record_from(payload: bytes, what: str) -> Record | None:
    """Return the record, None for a type that a later version brought; `DataError` naming `what` if it is none."""
    try:
        message = codec.decode(payload, what)
        shape = _SHAPES.get(message.get("type")) if type(message) is dict else None
        if shape is None:
            if type(message) is dict and type(message.get("type")) is str:
                return None
            raise WireError(f"{what}: it is no record")
        return msgspec.convert(message, shape).record(what)
    except (WireError, msgspec.ValidationError, TypeError) as error:
        raise DataError(str(error) if isinstance(error, WireError) else f"{what}: {error}") from error


class _RolloutShape(msgspec.Struct):
    """What must be so for `RecordedRollout` to be built; what hooks reported stays as it was written."""

    rollout_id: int
    weight_version: str = ""
    evaluation: bool = False
    groups: list[dict[str, Any]] = []
    raw_rewards: list[Any] | None = None
    rewards: list[Any] | None = None
    metrics: dict[str, Any] = {}

    def record(self, what: str) -> RecordedRollout:
        fields = msgspec.structs.asdict(self)
        fields["groups"] = [
            RecordedGroup(group_from(group.get("samples"), f"{what}, group {number}"), group.get("dropped"))
            for number, group in enumerate(self.groups)
        ]
        return RecordedRollout(**fields)


class _TrainShape(msgspec.Struct):
    rollout_id: int
    columns: dict[str, Any] = {}

    def record(self, what: str) -> RecordedTrainBatch:  # noqa: ARG002
        columns = {name: _plain_lists(column) for name, column in self.columns.items()}
        return RecordedTrainBatch(self.rollout_id, columns)


def _plain_lists(column: Any) -> Any:
    if type(column) is not list:
        return column
    return [entry.read() if type(entry) is PackedColumn else entry for entry in column]


_SHAPES: dict[Any, type[_RolloutShape] | type[_TrainShape]] = {"rollout": _RolloutShape, "train": _TrainShape}
