"""`dynamic_filter`, `sample_filter` and `all_samples_process` on rollouts: what would be kept, removed, changed."""

# ruff: noqa: ARG002  all replayers are given the same, and each hook needs another part of it

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from miles_api.errors import counted
from miles_api.replay.replayer import Replayer, copies
from miles_api.replay.subject import Subject
from miles_api.rollout_types import flatten

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.record import RecordedRollout
    from miles_api.sample import Sample

__all__ = ["AllSamplesReplayer", "DynamicFilterReplayer", "SampleFilterReplayer"]

_EVALUATION = "evaluations, which it does not see"


class DynamicFilterReplayer(Replayer):
    """Judges every group that was filtered, the dropped ones too.

    A dump says why a group was dropped and not by which filter, so with several filters a group that another one
    dropped counts as recorded dropped.
    """

    unit = "group"

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._counts: Counter[str] = Counter()
        self._reasons: Counter[str] = Counter()
        self._changes: list[dict[str, Any]] = []

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        if record.evaluation:
            self.skip(_EVALUATION)
            return
        for number, group in enumerate(record.groups):
            yield Subject(number, record.rollout_id, False, [group.samples], dropped=group.dropped)

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.args, flatten(copies(subject.groups))), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        bare = isinstance(value, bool) or not hasattr(value, "keep")
        keep = value if bare else value.keep
        if not isinstance(keep, bool) and hasattr(keep, "item") and getattr(keep, "ndim", 0) == 0:
            keep = keep.item()
        if not isinstance(keep, bool):
            raise self.wrong(f"returned {value!r:.200}, not a verdict (a bool or DynamicFilterOutput)")
        reason = None if bare else getattr(value, "reason", None)
        return [keep, None if reason is None else str(reason)]

    def compare(self, subject: Subject, result: Any) -> None:
        keep, reason = result
        before = "kept" if subject.dropped is None else "dropped"
        after = "kept" if keep else "dropped"
        self._counts[f"{before} → {after}"] += 1
        if not keep:
            self._reasons[reason or "no reason given"] += 1
        if before == after:
            return
        self.changed += 1
        if len(self._changes) < self.shown:
            samples = flatten(subject.groups)
            self._changes.append({
                "group": samples[0].group_index, "rollout": subject.rollout_id, "recorded": before, "new": after,
                "reason": subject.dropped if keep else reason, "rewards": [sample.reward for sample in samples],
            })  # fmt: skip

    def facts(self) -> dict[str, Any]:
        return {"counts": dict(self._counts), "reasons": dict(self._reasons), "changes": self._changes}

    def lines(self) -> list[str]:
        lines = [f"{what:18} {count}" for what, count in sorted(self._counts.items(), reverse=True)]
        lines += [f"dropped now, {reason}: {count}" for reason, count in self._reasons.most_common(5)]
        for change in self._changes:
            why = f"recorded reason {change['reason']}" if change["new"] == "kept" else f"reason {change['reason']}"
            lines.append(
                f"  group {change['group']} (rollout {change['rollout']}): {change['recorded']} → {change['new']}, "
                f"{why}, rewards {change['rewards']}"
            )
        return lines


class SampleFilterReplayer(Replayer):
    """Marks samples of whole rollouts; counts `remove_sample` flags.

    Where the recorded run had a sample filter, the flags in the dump are its result and are cleared before the call.
    """

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._removed_before = self._removed_after = self._samples = self._flipped = 0
        self._changes: list[dict[str, Any]] = []

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        if record.evaluation:
            self.skip(_EVALUATION)
            return
        yield Subject(0, record.rollout_id, False, [group.samples for group in record.groups if group.dropped is None])

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        groups = copies(subject.groups)
        if self.recorded.get("rollout_sample_filter_path"):
            for sample in flatten(groups):
                sample.remove_sample = False
        return (self.args, groups), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        after = flatten(arguments[1])
        if len(after) != len(flatten(subject.groups)):
            raise self.wrong(
                f"left {len(after)} of {len(flatten(subject.groups))} samples: it may mark samples "
                "(remove_sample = True) and not take them out"
            )
        return [bool(sample.remove_sample) for sample in after]

    def compare(self, subject: Subject, result: Any) -> None:
        flipped = False
        for sample, removed in zip(flatten(subject.groups), result, strict=True):
            self._samples += 1
            self._removed_before += sample.remove_sample
            self._removed_after += removed
            if sample.remove_sample != removed:
                self._flipped += 1
                flipped = True
                if len(self._changes) < self.shown:
                    self._changes.append({
                        "sample": sample.index, "rollout": subject.rollout_id, "recorded": sample.remove_sample,
                        "new": removed, "reward": sample.reward, "status": str(sample.status.value),
                    })  # fmt: skip
        self.changed += flipped

    def facts(self) -> dict[str, Any]:
        return {
            "samples": self._samples, "removed_recorded": self._removed_before, "removed_new": self._removed_after,
            "flipped": self._flipped, "changes": self._changes,
        }  # fmt: skip

    def lines(self) -> list[str]:
        lines = [
            f"removed   {self._removed_before} → {self._removed_after} of {self._samples} samples",
            f"flipped   {self._flipped}",
        ]
        return lines + [
            f"  sample {change['sample']} (rollout {change['rollout']}): remove_sample {change['recorded']} → "
            f"{change['new']}, reward {change['reward']}, {change['status']}"
            for change in self._changes
        ]


class AllSamplesReplayer(Replayer):
    """Shows whole rollouts, dropped groups included; says what was changed in their samples."""

    def __init__(self, *given: Any, **settings: Any) -> None:
        super().__init__(*given, **settings)
        self._fields: Counter[str] = Counter()
        self._rollouts = 0

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        if record.evaluation:
            self.skip(_EVALUATION)
            return
        yield Subject(0, record.rollout_id, False, [group.samples for group in record.groups])

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self.args, copies(subject.groups), _NoDataSource()), {}

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        before, after = flatten(subject.groups), flatten(arguments[1])
        if len(before) != len(after):
            return {"number of samples": abs(len(before) - len(after))}
        fields = Counter(name for old, new in zip(before, after, strict=True) for name in _changed_fields(old, new))
        return dict(fields)

    def compare(self, subject: Subject, result: Any) -> None:
        self._rollouts += 1
        self._fields.update(result)
        self.changed += bool(result)

    def facts(self) -> dict[str, Any]:
        return {"rollouts": self._rollouts, "rollouts_changed": self.changed, "fields": dict(self._fields)}

    def lines(self) -> list[str]:
        if not self._fields:
            return [f"ran on {counted(self._rollouts, 'rollout')} and changed no sample"]
        return [
            f"ran on {counted(self._rollouts, 'rollout')} and changed samples in {self.changed}",
            *(f"  {name}: {counted(count, 'sample')}" for name, count in self._fields.most_common()),
        ]


class _NoDataSource:
    """Stands in for the data source of a run."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"data_source.{name}: a dump holds no data source")


def _changed_fields(old: Sample, new: Sample) -> list[str]:
    fields = [name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name)]
    return fields + [name for name, value in vars(new).items() if vars(old).get(name, _MISSING) != value]


_MISSING = object()
