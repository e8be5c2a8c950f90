"""Train-side hooks on recorded training batches, by what miles-train offers under `miles.replay`."""

from __future__ import annotations

from time import perf_counter
from typing import TYPE_CHECKING, Any

from miles_api.args import Args
from miles_api.errors import ConfigError
from miles_api.loading.hookset import HookSet
from miles_api.loading.load import entry_points, provider
from miles_api.record import RecordedTrainBatch
from miles_api.replay.result import Progress, Replay, note_failure
from miles_api.replay.subject import failure_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.loading.bind import BoundHook
    from miles_api.record import Dump
    from miles_api.spec import HookSpec

    Replayers = dict[str, Callable[[BoundHook, Args, RecordedTrainBatch], dict[str, float]]]

__all__ = ["TrainReplay"]

_GROUP, _NAME = "miles.replay", "train"
_SLOWEST = 3
_SHOWN = 8
"""Batches whose numbers are listed in words."""


class TrainReplay:
    """Calls one hook on each recorded batch, in the main thread: that is where a trainer calls it."""

    def __init__(self, spec: HookSpec, reference: str, flat: dict[str, Any], result: Replay, limit: int | None) -> None:
        replayers = _replayers()
        if spec.name not in replayers:
            raise ConfigError(
                f"a {spec.name} hook cannot be replayed on training batches; these can: {', '.join(sorted(replayers))}"
            )
        self._replay = replayers[spec.name]
        self._args = Args(flat)
        self._hooks = HookSet(self._args, [spec.name])
        self._hook = next(hook for hook in self._hooks.many(spec.name) if hook.reference == reference)
        self._result, self._limit = result, limit

    def run(self, dump: Dump, progress: Progress) -> None:
        """Go through the dump and fill in the result."""
        batches: list[dict[str, Any]] = []
        for record in dump:
            if self._limit is not None and self._result.calls >= self._limit:
                break
            if isinstance(record, RecordedTrainBatch):
                self._one(record, batches)
                progress(self._result.calls, self._result.failed + self._result.changed)
        self._hooks.close()
        self._result.facts = {"batches": batches}
        self._result.lines = [
            f"rollout {batch['rollout']}: " + ", ".join(f"{name} {value:g}" for name, value in batch["numbers"].items())
            for batch in batches[:_SHOWN]
        ]
        if len(batches) > _SHOWN:
            self._result.lines.append(f"… and {len(batches) - _SHOWN} more (--json lists all)")

    def _one(self, record: RecordedTrainBatch, batches: list[dict[str, Any]]) -> None:
        result, name = self._result, f"the batch of rollout {record.rollout_id}"
        started = perf_counter()
        try:
            numbers = self._replay(self._hook, self._args, record)
        except (Exception, SystemExit) as error:
            note_failure(result, name, failure_of(error))
        else:
            batches.append({"rollout": record.rollout_id, "numbers": numbers})
            result.changed += any("changed" in key and value for key, value in numbers.items())
        seconds = perf_counter() - started
        result.calls += 1
        result.seconds += seconds
        result.slowest.append({"what": name, "seconds": seconds})
        result.slowest = sorted(result.slowest, key=lambda one: one["seconds"], reverse=True)[:_SLOWEST]


def _replayers() -> Replayers:
    wanted = "replaying a train-side hook needs miles-train and torch: pip install 'miles-train[megatron]'"
    if _NAME not in entry_points(_GROUP):
        raise ConfigError(wanted)
    try:
        return provider(_GROUP, _NAME)
    except ImportError as error:
        raise ConfigError(f"{wanted} ({error})") from error
