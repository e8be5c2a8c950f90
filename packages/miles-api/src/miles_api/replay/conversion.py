"""`reward_post_process` and `convert_samples` on recorded rollouts: the numbers and columns that would train."""

# ruff: noqa: ARG002  all replayers are given the same, and each hook needs another part of it

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from miles_api.batch import REQUIRED_COLUMNS, check_columns
from miles_api.errors import HookLoadError, MilesError, SampleError, counted
from miles_api.loading.load import provider
from miles_api.loading.plain import plain_number
from miles_api.replay.replayer import Replayer, same, trained
from miles_api.replay.subject import Subject
from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.record import RecordedRollout
    from miles_api.sample import Sample

__all__ = ["ConvertReplayer", "PostProcessReplayer"]

_EVALUATION = "evaluations, which it does not see"


class _WholeRollout(Replayer):
    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        if record.evaluation:
            self.skip(_EVALUATION)
            return
        samples = trained(record)
        if not samples:
            self.skip("rollouts of which nothing was kept")
            return
        yield Subject(
            0, record.rollout_id, False, [list(samples)], raw_rewards=record.raw_rewards, rewards=record.rewards
        )


class PostProcessReplayer(_WholeRollout):
    """Computes `(raw_rewards, rewards)` of whole rollouts."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._samples = self._unrecorded = 0
        self._differ = {"raw_rewards": 0, "rewards": 0}
        self._largest = {"raw_rewards": 0.0, "rewards": 0.0}
        self._groups: list[dict[str, Any]] = []

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.args, [copy.copy(sample) for sample in flatten(subject.groups)]), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        if not isinstance(value, list | tuple) or len(value) != len(self._differ):
            raise self.wrong(f"returned {type(value).__name__}, not (raw_rewards, rewards)")
        samples = flatten(subject.groups)
        return [self._numbers(part, samples, name) for part, name in zip(value, self._differ, strict=True)]

    def _numbers(self, values: Any, samples: list[Sample], name: str) -> list[float]:
        values = values.tolist() if hasattr(values, "tolist") else values
        if not isinstance(values, list | tuple) or len(values) != len(samples):
            got = f"{len(values)} {name}" if isinstance(values, list | tuple) else f"{type(values).__name__} as {name}"
            raise self.wrong(f"returned {got} for {len(samples)} samples")
        pairs = zip(values, samples, strict=True)
        return [plain_number(value, self.who, f"{name} of sample {sample.index}") for value, sample in pairs]

    def compare(self, subject: Subject, result: Any) -> None:
        samples = flatten(subject.groups)
        self._samples += len(samples)
        groups: dict[Any, float] = {}
        for name, new in zip(self._differ, result, strict=True):
            recorded = getattr(subject, name)
            if recorded is None or len(recorded) != len(new):
                self._unrecorded += 1
                continue
            for sample, a, b in zip(samples, recorded, new, strict=True):
                if not same(a, b):
                    self._differ[name] += 1
                    self._largest[name] = max(self._largest[name], abs(a - b))
                    groups[sample.group_index] = max(groups.get(sample.group_index, 0.0), abs(a - b))
        self.changed += bool(groups)
        for group, difference in sorted(groups.items(), key=lambda item: -item[1])[: self.shown - len(self._groups)]:
            self._groups.append({"group": group, "rollout": subject.rollout_id, "difference": difference})

    def facts(self) -> dict[str, Any]:
        return {
            "samples": self._samples, "differ": self._differ, "largest_difference": self._largest,
            "rollouts_changed": self.changed, "not_recorded": self._unrecorded, "groups": self._groups,
        }  # fmt: skip

    def lines(self) -> list[str]:
        lines = [
            f"{name:12} {count} of {self._samples} differ" + (f", by at most {self._largest[name]:g}" if count else "")
            for name, count in self._differ.items()
        ]
        if self._unrecorded:
            lines.append(f"{self._unrecorded} lists had no recorded one to compare with")
        return lines + [
            f"  group {one['group']} (rollout {one['rollout']}): differs by {one['difference']:g}"
            for one in self._groups
        ]


class ConvertReplayer(_WholeRollout):
    """Makes the columns of whole rollouts and checks them; compared with the default conversion where one is installed.

    A dump holds samples and no columns.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._columns: dict[str, str] = {}
        self._differ: dict[str, int] = {}
        self._compared = 0
        self._no_default = ""

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._given(subject)

    def _given(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        samples = copy.deepcopy(flatten(subject.groups))
        raw, rewards = subject.raw_rewards, subject.rewards
        if raw is None or rewards is None or len(raw) != len(samples) or len(rewards) != len(samples):
            raw = rewards = [sample.get_reward_value(self.args) for sample in samples]
        return (self.args, samples), {"raw_rewards": list(raw), "rewards": list(rewards)}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        if not isinstance(value, dict):
            raise self.wrong(f"returned {type(value).__name__}, not a dict of columns")
        try:
            check_columns(value)
        except SampleError as error:
            raise self.wrong(f"returned columns that contradict themselves: {error}") from error
        differ = None
        try:
            positional, keywords = self._given(subject)
            default = provider("miles.defaults", "convert_samples")(*positional, **keywords)
            differ = _differences(default, value)
        except HookLoadError:
            reason = "no default conversion is installed to compare with (miles-rollout has one)"
        except MilesError as error:
            reason = f"the default conversion refuses these samples: {error}"
        else:
            reason = ""
        return {"columns": {name: _words(column) for name, column in value.items()}, "differ": differ, "why": reason}

    def compare(self, subject: Subject, result: Any) -> None:
        self._columns |= result["columns"]
        if result["differ"] is None:
            self._no_default = result["why"]
            return
        self._compared += 1
        self.changed += bool(result["differ"])
        for name, count in result["differ"].items():
            self._differ[name] = self._differ.get(name, 0) + count

    def facts(self) -> dict[str, Any]:
        return {
            "columns": self._columns, "beyond_the_contract": sorted(set(self._columns) - REQUIRED_COLUMNS),
            "compared_with_default": self._compared, "differ": self._differ, "not_compared": self._no_default,
        }  # fmt: skip

    def lines(self) -> list[str]:
        lines = ["columns:", *(f"  {name:20} {words}" for name, words in self._columns.items())]
        if self._compared:
            lines.append(f"against the default conversion, in {counted(self._compared, 'rollout')}:")
            lines += [
                f"  {name}: {counted(count, 'entry differs', 'entries differ')}" for name, count in self._differ.items()
            ] or ["  no difference"]
        if self._no_default:
            lines.append(f"not compared: {self._no_default}")
        return lines


def _differences(default: dict[str, Any], value: dict[str, Any]) -> dict[str, int]:
    """Count the entries of each column that differ; a column that only one side has differs in all of them."""
    found = {}
    for name in {**default, **value}:
        a, b = default.get(name), value.get(name)
        if a is None or b is None or len(a) != len(b):
            found[name] = max(len(side) for side in (a, b) if side is not None)
        else:
            found[name] = sum(_plain(one) != _plain(other) for one, other in zip(a, b, strict=True))
    return {name: count for name, count in found.items() if count}


def _plain(entry: Any) -> Any:
    return entry.tolist() if hasattr(entry, "tolist") else entry


def _words(column: Any) -> str:
    """Describe a column by its first entry: `list of int, 12 long` or `ndarray of int64, shape (12,)`."""
    entry = column[0]
    if getattr(entry, "dtype", None) is not None:
        return f"{type(entry).__name__} of {entry.dtype}, shape {tuple(entry.shape)}"
    if isinstance(entry, list) and entry:
        return f"list of {type(entry[0]).__name__}, {len(entry)} long in the first of {len(column)}"
    return f"{type(entry).__name__}"
