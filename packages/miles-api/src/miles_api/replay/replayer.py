"""What the replay of one hook consists of, and the parts that all of them share."""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.args import Args
    from miles_api.record import RecordedRollout
    from miles_api.replay.subject import Subject
    from miles_api.rollout_types import Group
    from miles_api.sample import Sample
from miles_api.rollout_types import flatten

__all__ = ["Replayer", "copies", "excerpt", "same", "trained"]

_EXCERPT = 60


class Replayer:
    """Takes the calls of one hook out of recorded rollouts and compares their results with what was recorded.

    `subjects` and `compare` run where the dump is read, `arguments` and `result` where the hook is called, which may be
    another process.
    """

    unit = "rollout"
    """What one call is about."""

    def __init__(
        self, args: Args, who: str, recorded: dict[str, Any], *, threshold: float = 0.5, shown: int = 5
    ) -> None:
        """`who` names the hook in errors, `recorded` is the recorded run's options.

        `threshold` parts good rewards from bad ones, and so many changes are `shown`.
        """
        self.args = args
        self.who = who
        self.recorded = recorded
        self.threshold = threshold
        self.shown = shown
        self.changed = 0
        """How many calls came out otherwise than recorded."""
        self.skipped: dict[str, int] = {}
        """What was left out, by reason."""

    def subjects(self, record: RecordedRollout) -> Iterator[Subject]:
        """Yield what the hook is called on in one rollout or evaluation."""
        raise NotImplementedError

    def arguments(self, subject: Subject) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return positional arguments and keywords, of copies: what was recorded stays as it was."""
        raise NotImplementedError

    def result(self, value: Any, arguments: tuple[Any, ...], subject: Subject) -> Any:
        """Return plain values of what the hook returned or did; `HookResultError` for what it may not."""
        raise NotImplementedError

    def compare(self, subject: Subject, result: Any) -> None:
        """Take one result into account."""
        raise NotImplementedError

    def facts(self) -> dict[str, Any]:
        """Return what was found, as plain values."""
        raise NotImplementedError

    def lines(self) -> list[str]:
        """Return what was found, in words."""
        raise NotImplementedError

    def skip(self, reason: str) -> None:
        """Count something that was left out."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1

    def wrong(self, problem: str) -> HookResultError:
        """Return an error that names the hook."""
        return HookResultError(f"{self.who} {problem}")


def trained(record: RecordedRollout) -> list[Sample]:
    """Return the samples that the rollout trained on, in the order of conversion."""
    samples = flatten([group.samples for group in record.groups if group.dropped is None])
    return sorted(samples, key=lambda sample: (sample.group_index or 0, sample.index or 0))


def copies(groups: list[Group]) -> list[Group]:
    """Return groups of deep copies, fan-outs kept."""
    return copy.deepcopy(groups)


def same(a: float, b: float) -> bool:
    """Compare numbers but for what another order of summation changes."""
    return a == b or math.isclose(a, b, rel_tol=1e-6, abs_tol=1e-9)


def excerpt(text: Any) -> str:
    """Return the end of a text, blanks as they are: there stand the question of a prompt and a response's answer."""
    exact = str(text)
    return exact if len(exact) <= _EXCERPT else "…" + exact[-_EXCERPT:]
