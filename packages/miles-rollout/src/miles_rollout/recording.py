"""Rollouts written to a file, for `miles hooks run` and --load-debug-rollout-data; and the samples that hooks fail on.

A recording holds prompts, responses, labels and metadata as they are, and every option that is not marked secret. Which
engine answered is not in it: two runs that are otherwise the same have engines at different addresses.
"""

from __future__ import annotations

import copy
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.config import option_groups
from miles_api.errors import MilesError
from miles_api.options import option_kind
from miles_api.record import DumpHeader, DumpWriter, RecordedGroup, RecordedRollout
from miles_rollout.pristine import copy_group

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.rollout_types import Group
    from miles_api.sample import Sample

__all__ = ["Recorder", "save_failed"]


class Recorder:
    """Writes one record a rollout or evaluation to `--save-debug-rollout-data`."""

    def __init__(self, path: str, config: dict[str, Any]) -> None:
        """Name the file; `open` opens it."""
        self._path = path
        self._config = config
        self._after: int | None = None
        self._writer: DumpWriter | None = None

    def continue_after(self, rollout_id: int) -> None:
        """Continue the recording that is there already behind this rollout; called before `open`."""
        self._after = rollout_id

    def open(self) -> None:
        """Open the file, if it is not open yet; raises `DataError` when it cannot be written."""
        if self._writer is None:
            append = self._after is not None
            self._writer = DumpWriter(self._path, _header(self._config), append=append, after=self._after)

    def rollout(
        self, rollout_id: int, weight_version: str, kept: list[Group], dropped: list[tuple[Group, str]]
    ) -> RecordedRollout:
        """Return the record of a rollout as it is now: what post-processing and conversion write is not part of it."""
        groups = [RecordedGroup(samples=copy_group(group)) for group in kept]
        groups += [RecordedGroup(samples=group, dropped=reason) for group, reason in dropped]
        return RecordedRollout(rollout_id=rollout_id, weight_version=weight_version, groups=groups)

    def evaluation(
        self, rollout_id: int, weight_version: str, samples: list[Sample], metrics: dict[str, float]
    ) -> RecordedRollout:
        """Return the record of an evaluation, a group for each prompt."""
        groups: dict[tuple[str, int | None], Group] = {}
        for sample in samples:
            groups.setdefault((str(sample.prompt), sample.group_index), []).append(sample)
        return RecordedRollout(
            rollout_id=rollout_id, weight_version=weight_version, evaluation=True, metrics=metrics,
            groups=[RecordedGroup(samples=group) for group in groups.values()],
        )  # fmt: skip

    def write(self, record: RecordedRollout) -> None:
        """Append one record."""
        self.open()
        assert self._writer is not None
        groups = [RecordedGroup(samples=_without_engines(g.samples), dropped=g.dropped) for g in record.groups]
        self._writer.write(msgspec.structs.replace(record, groups=groups))

    def close(self) -> None:
        """Close the file."""
        if self._writer is not None:
            self._writer.close()


def _without_engines(group: Group) -> Group:
    return [[_anonymous(s) for s in item] if isinstance(item, list) else _anonymous(item) for item in group]


def _anonymous(sample: Sample) -> Sample:
    if not sample.engines:
        return sample
    sample = copy.copy(sample)
    sample.engines = []
    return sample


def save_failed(args: Args, hook: BoundHook, subject: list[Sample]) -> str:
    """Write what a hook failed on below `run_dir`/failed; return ` (saved as …)`, or why it could not be.

    What a hook leaves in a sample may be beyond any file format: that must not hide what the hook raised.
    """
    path = Path(args.run_dir, "failed", f"{hook.spec.name}-{subject[0].index}.mdump")
    record = RecordedRollout(rollout_id=0, groups=[RecordedGroup(samples=list(subject))])
    try:
        with DumpWriter(path, _header(_public(args, hook))) as writer:
            writer.write(record)
    except (MilesError, OSError, TypeError, ValueError) as error:
        return f" (the sample could not be saved: {error})"
    return f" (replay with: miles hooks run {_runnable(hook)} --as {hook.spec.name} --samples {path})"


def _runnable(hook: BoundHook) -> str:
    """Return a reference that a command takes; a default bears the name `default`, which none does."""
    if hook.configured:
        return hook.reference
    named = hook.target if inspect.isroutine(hook.target) else type(hook.target)
    return f"{named.__module__}:{named.__qualname__}"


def _header(config: dict[str, Any]) -> DumpHeader:
    return DumpHeader(kind="rollout", config=config, tokenizer=str(config.get("hf_checkpoint") or ""))


def _public(args: Args, hook: BoundHook) -> dict[str, Any]:
    """Return the options that may be written: those of installed packages and of this hook, without secrets."""
    groups: list[type[msgspec.Struct]] = [*option_groups().values()]
    own = getattr(hook.target, "options", None)
    if isinstance(own, type) and issubclass(own, msgspec.Struct):
        groups.append(own)
    names = [i.name for group in groups for i in msgspec.structs.fields(group) if not option_kind(i.type).secret]
    return {name: getattr(args, name) for name in names if name in args}
