"""Rollouts of an earlier run, read from its recording: the same samples again, without engines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.errors import ConfigError, DataError, counted
from miles_api.record import RecordedRollout, read_dump
from miles_api.rollout_types import RolloutFnConstructorInput, RolloutFnEvalInput, RolloutFnTrainInput
from miles_api.rollout_types import RolloutFnTrainOutput as Output

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.record import Dump

__all__ = ["RecordedRollouts"]

_CARRIED = "rollout/dropped/"
"""The metrics of a recording that cannot be computed again from the groups that were kept."""


class RecordedRollouts:
    """Yield the groups that `--load-debug-rollout-data` holds for a rollout, those that its filters kept.

    They were filtered when they were recorded; reward post-processing and conversion run again. Where a rollout was
    recorded twice, by a run that was resumed, the later one counts.
    """

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        self._path: str | None = input.args.load_debug_rollout_data
        if self._path is None:
            raise ConfigError("the rollout hook `recorded` needs --load-debug-rollout-data")
        self._dump = self._open(self._path)
        self._places: dict[int, int] = {}
        for place, record in enumerate(self._dump):
            if isinstance(record, RecordedRollout) and not record.evaluation:
                self._places[record.rollout_id] = place
        self._damage = f"; it is damaged: {self._dump.damage}" if self._dump.damage else ""
        self._records = enumerate(self._dump)
        self._next = 0

    def __call__(self, input: RolloutFnTrainInput | RolloutFnEvalInput) -> Output:  # noqa: A002
        if isinstance(input, RolloutFnEvalInput):
            raise ConfigError("recorded rollouts cannot be evaluated: no engine runs with --load-debug-rollout-data")
        place = self._places.get(input.rollout_id)
        if place is None:
            raise DataError(
                f"--load-debug-rollout-data {self._path} holds {counted(len(self._places), 'rollout')}{self._span()}, "
                f"and not rollout {input.rollout_id}{self._damage}"
            )
        record = self._at(place)
        dropped = {name: value for name, value in record.metrics.items() if name.startswith(_CARRIED)}
        return Output(samples=[group.samples for group in record.groups if group.dropped is None], metrics=dropped)

    def _span(self) -> str:
        return f" ({min(self._places)} to {max(self._places)})" if self._places else ""

    @staticmethod
    def _open(path: str) -> Dump:
        dump = read_dump(path)
        if dump.header.kind != "rollout":
            raise DataError(
                f"--load-debug-rollout-data {path} records {dump.header.kind} data; it needs what "
                "--save-debug-rollout-data wrote"
            )
        return dump

    def _at(self, place: int) -> RecordedRollout:
        if place < self._next:
            self._records, self._next = enumerate(self._dump), 0
        self._next = place + 1
        return _skip_to(self._records, place)


def _skip_to(records: Iterator[tuple[int, object]], place: int) -> RecordedRollout:
    for here, record in records:
        if here == place and isinstance(record, RecordedRollout):
            return record
    raise DataError(f"the recording was changed while it was read: record {place} is gone")
