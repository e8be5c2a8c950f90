"""Do filters decide on every kind of group, take what they hand out and touch nothing else?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import flatten
from miles_api.sample import Sample, Status
from miles_api.testing.case import case
from miles_api.testing.state import MemorySource
from miles_api.testing.untouched import IDENTITY, READ_ONLY, Untouched

if TYPE_CHECKING:
    from collections.abc import Callable

    from miles_api.rollout_types import Group
    from miles_api.testing.trial import Trial

__all__: list[str] = []


@case("dynamic_filter")
def _dynamic_filter(trial: Trial) -> None:
    def decide(*groups: list[Sample]) -> None:
        samples = [sample for group in groups for sample in group]
        before = Untouched(samples, (*READ_ONLY, "reward", "status"))
        given = [list(group) for group in groups]
        for group, kept, verdict in zip(
            groups, given, trial.together([(trial.args, group) for group in given]), strict=True
        ):
            _require_verdict(trial, verdict)
            trial.require([*map(id, group)] == [*map(id, kept)], "reordered, added or removed samples in its list")
        before.require(trial)

    with trial.check("decides on a group with different rewards"):
        decide(trial.maker.scored(1.0, 0.0, 1.0))
    with trial.check("decides on a group in which all rewards are equal"):
        decide(trial.maker.scored(0.0, 0.0, 0.0))
    with trial.check("decides on a group of one"):
        decide(trial.maker.scored(1.0))
    with trial.check("decides on a group with an aborted sample"):
        aborted = trial.maker.scored(1.0, 0.0)
        aborted[1].status = Status.ABORTED
        decide(aborted)
    with trial.check("decides on several groups at once"):
        decide(trial.maker.scored(1.0, 0.0), trial.maker.scored(0.0, 0.0, 0.0), trial.maker.scored(1.0))


def _require_verdict(trial: Trial, verdict: Any) -> None:
    keep = getattr(verdict, "keep", verdict)
    keep = keep.item() if not isinstance(keep, bool) and hasattr(keep, "item") else keep
    trial.require(isinstance(keep, bool), f"returned {verdict!r:.100}, not a bool or DynamicFilterOutput")
    reason = getattr(verdict, "reason", None)
    trial.require(reason is None or isinstance(reason, str), f"gave {reason!r:.60} as reason, not text", field="reason")


@case("buffer_filter")
def _buffer_filter(trial: Trial) -> None:
    def pick(rollout_id: int | None, count: int) -> None:
        fanned: Group = [trial.maker.group(2), *trial.maker.prompts(1, 1)[0]]
        buffer: list[Group] = [*([*group] for group in trial.maker.prompts(3, 2)), fanned]
        before, owned = Untouched(flatten(buffer), IDENTITY), {id(group) for group in buffer}
        taken = trial.call(trial.args, rollout_id, buffer, count)
        trial.require(isinstance(taken, list), f"returned a {type(taken).__name__}, not a list of groups")
        trial.require(len(taken) <= count, f"returned {len(taken)} groups; {count} were asked for")
        for group in taken:
            trial.require(
                id(group) in owned, "returned a group that was not in the buffer: their samples must stay theirs"
            )
            trial.require(
                all(group is not other for other in buffer),
                "left a group that it returned in the buffer, which would be generated twice",
            )
        trial.require(len({id(group) for group in taken}) == len(taken), "returned a group twice")
        trial.require({id(group) for group in buffer} <= owned, "put groups into the buffer")
        before.require(trial)

    with trial.check("takes groups out of the buffer"):
        pick(None, 2)
    with trial.check("takes what there is when more is asked for"):
        pick(3, 9)


@case("sample_filter")
def _sample_filter(trial: Trial) -> None:
    _in_place(trial, lambda groups: (trial.args, groups))


@case("all_samples_process")
def _all_samples_process(trial: Trial) -> None:
    source = MemorySource(trial.maker, trial.args.n_samples_per_prompt)
    _in_place(trial, lambda groups: (trial.args, groups, source))


def _in_place(trial: Trial, arguments: Callable[[list[Group]], tuple[Any, ...]]) -> None:
    """Check a hook that looks at all groups of a rollout and returns nothing."""

    def process(groups: list[Group]) -> None:
        samples = flatten(groups)
        before = Untouched(samples, IDENTITY)
        result = trial.call(*arguments(groups))
        trial.require(
            result is None, f"returned a {type(result).__name__}; what it returns is not used: change in place"
        )
        trial.require([*map(id, flatten(groups))] == [*map(id, samples)], "reordered, added or removed samples")
        before.require(trial)
        trial.sound(samples)

    with trial.check("takes groups of different sizes, groups of one, fan-outs and removed samples"):
        process(trial.maker.rollout())
    with trial.check("takes a rollout of one group"):
        process([[*trial.maker.scored(1.0, 0.0)]])
