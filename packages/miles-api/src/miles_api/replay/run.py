"""One replay from dump to findings."""

from __future__ import annotations

import heapq
import itertools
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.args import Args
from miles_api.errors import ConfigError, DataError
from miles_api.hook_options import HookOptions
from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import HookSet, configured_hooks
from miles_api.parsing.given import locate
from miles_api.record import Dump, RecordedRollout, read_dump
from miles_api.replay.hooks import REFUSED, REPLAYERS
from miles_api.replay.in_process import InLoop, InThreads
from miles_api.replay.options import replay_options
from miles_api.replay.result import Progress, Replay, Request, note_failure
from miles_api.replay.train import TrainReplay
from miles_api.replay.workers import InWorkers

if TYPE_CHECKING:
    from miles_api.replay.replayer import Replayer
    from miles_api.replay.subject import Reply, Subject

__all__ = ["replay"]

_SLOWEST = 3


def replay(request: Request, progress: Progress) -> Replay:
    """Call the hook on everything that the dump holds for it, and compare.

    Raises `ConfigError` for a hook that cannot be replayed, an option that is none, or a dump of the other kind;
    `DataError` for a dump that cannot be read or holds nothing for this hook; `HookError` for a reference that does not
    load or fit. What the hook itself does wrong is in the result.
    """
    if request.hook in REFUSED:
        raise ConfigError(
            f"a {request.hook} hook cannot be replayed: {REFUSED[request.hook]}; "
            f"`miles hooks check REF --as {request.hook} --call` calls it on made-up inputs"
        )
    dump = read_dump(request.dump)
    spec = REGISTRY[request.hook]
    # An older run's options lack the flags of newer hooks.
    options = Args({**msgspec.structs.asdict(HookOptions()), **dump.header.config})
    recorded = configured_hooks(options).get(spec.name, [])
    if dump.header.kind == "train":
        _require(spec.name not in REPLAYERS, request, "--save-debug-rollout-data")
    else:
        _require(spec.name in REPLAYERS, request, "--save-debug-train-data")
    reference = _reference(request, recorded)
    # Options hold references as a run records them.
    located = locate(reference, None)
    flat = replay_options(spec, located, dump.header.config, request.settings)
    result = Replay(
        hook=spec.name, reference=reference, recorded_reference=", ".join(recorded) or None, dump=request.dump,
        unit="batch", how="in this process",
    )  # fmt: skip
    if dump.header.kind == "train":
        TrainReplay(spec, located, flat, result, request.limit).run(dump, progress)
    else:
        _Rollouts(request, flat, dump.header.config, result).run(dump, progress)
    result.damage = dump.damage
    if result.calls == 0:
        left_out = "; ".join(f"left out: {count} {what}" for what, count in result.skipped.items())
        raise DataError(f"{request.dump} holds nothing for a {spec.name} hook" + (f" ({left_out})" if left_out else ""))
    return result


def _require(fits: bool, request: Request, flag: str) -> None:
    if not fits:
        raise ConfigError(f"a {request.hook} hook is replayed on what {flag} records; {request.dump} is a dump of the "
                          "other kind")  # fmt: skip


def _reference(request: Request, recorded: list[str]) -> str:
    if request.reference is not None:
        return request.reference
    if len(recorded) == 1:
        return recorded[0]
    named = f"named {', '.join(recorded)}: say which" if recorded else f"named no {request.hook} hook: name one"
    raise ConfigError(f"the recorded run {named}")


class _Rollouts:
    """Replays a hook of the rollout process, a record at a time."""

    def __init__(self, request: Request, flat: dict[str, Any], recorded: dict[str, Any], result: Replay) -> None:
        self._limit = request.limit
        self._result = result
        args = Args(flat)
        # Resolved here even where other processes call it: a mistake shows before any of them starts.
        self._hooks = HookSet(args, [request.hook], build=request.workers == 0)
        hook = self._hooks.need(request.hook)
        self._replayer: Replayer = REPLAYERS[request.hook](
            hook.view or args, f"the {request.hook} hook {result.reference}", recorded,
            threshold=request.threshold, shown=request.shown,
        )  # fmt: skip
        result.unit = self._replayer.unit
        self._caller: InLoop | InThreads | InWorkers
        if request.workers:
            self._caller = InWorkers(request.hook, flat, recorded, request.timeout, request.workers)
            result.how = f"in {request.workers} process{'es' if request.workers > 1 else ''}"
        elif hook.is_async:
            self._caller = InLoop(hook, self._replayer, request.timeout)
            result.how = "on one event loop"
        else:
            self._caller = InThreads(hook, self._replayer, request.timeout)
            result.how = "in threads"
        self._slowest: list[tuple[float, int, str]] = []

    def run(self, dump: Dump, progress: Progress) -> None:
        """Go through the dump and fill in the result."""
        try:
            for record in dump:
                subjects = self._subjects(record)
                if subjects:
                    self._replay(subjects, progress)
                if self._limit is not None and self._result.calls >= self._limit:
                    break
        finally:
            self._caller.close(self._hooks.aclose)
        result, replayer = self._result, self._replayer
        result.changed, result.skipped = replayer.changed, replayer.skipped
        result.facts, result.lines = replayer.facts(), replayer.lines()
        slowest = sorted(self._slowest, reverse=True)
        result.slowest = [{"what": name, "seconds": seconds} for seconds, _, name in slowest]

    def _subjects(self, record: Any) -> list[Subject]:
        if not isinstance(record, RecordedRollout):
            return []
        left = None if self._limit is None else self._limit - self._result.calls
        return list(itertools.islice(self._replayer.subjects(record), left))

    def _replay(self, subjects: list[Subject], progress: Progress) -> None:
        result = self._result
        before, bad = result.calls, result.failed + self._replayer.changed
        started = perf_counter()
        replies = self._caller.run(subjects, lambda done: progress(before + done, bad))
        result.seconds += perf_counter() - started
        by_number = {subject.number: subject for subject in subjects}
        for reply in sorted(replies, key=lambda reply: reply.number):
            self._take(by_number[reply.number], reply)
        progress(result.calls, result.failed + self._replayer.changed)

    def _take(self, subject: Subject, reply: Reply) -> None:
        self._result.calls += 1
        entry = (reply.seconds, self._result.calls, "")
        if len(self._slowest) < _SLOWEST or entry > self._slowest[0]:
            entry = (reply.seconds, self._result.calls, subject.name)
            (heapq.heappush if len(self._slowest) < _SLOWEST else heapq.heapreplace)(self._slowest, entry)
        if reply.failure is None:
            self._replayer.compare(subject, reply.result)
        else:
            note_failure(self._result, subject.name, reply.failure)
