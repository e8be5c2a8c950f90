"""One call of a replay: what it is about, and what came of it."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import msgspec

from miles_api.errors import MilesError
from miles_api.rollout_types import Group, flatten

__all__ = ["Failure", "Reply", "Subject", "failure_of", "timed_out"]

_OURS = frozenset(("miles_api", "miles_rollout", "miles_train", "miles_router"))
"""The packages whose code calls hooks."""
_FRAMES = 3
_MOST_TEXT = 500


class Subject(msgspec.Struct):
    """What one call is about."""

    number: int
    """Which call of the record it is."""
    rollout_id: int
    evaluation: bool
    groups: list[Group]
    """The recorded samples: a hook gets copies of them."""
    dropped: str | None = None
    """The reason with which a filter dropped the group; None: it was kept."""
    raw_rewards: list[float] | None = None
    rewards: list[float] | None = None

    @property
    def name(self) -> str:
        """Say which one it is, in words."""
        where = f"{'evaluation of ' if self.evaluation else ''}rollout {self.rollout_id}"
        samples = flatten(self.groups)
        if len(samples) == 1:
            return f"sample {samples[0].index} ({where})"
        if len(self.groups) == 1 and samples:
            return f"group {samples[0].group_index} ({where})"
        return where


class Failure(msgspec.Struct):
    """An exception of a hook, or what is wrong with its result, in a form that travels between processes."""

    kind: str
    message: str
    frames: list[str] = []
    """The last frames of the traceback that are not ours, each in one line."""


class Reply(msgspec.Struct):
    """What came of one call."""

    number: int
    seconds: float
    result: Any = None
    failure: Failure | None = None


def failure_of(error: BaseException) -> Failure:
    """Describe an exception by the user's own frames; ours say nothing to the author of a hook."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not _OURS.intersection(Path(frame.filename).parts)]
    if not own and not isinstance(error, MilesError):
        # One of our own hooks.
        own = [*frames]
    shown = [f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}" for frame in own[-_FRAMES:]]
    return Failure(type(error).__name__, f"{error!s:.{_MOST_TEXT}}", shown)


def timed_out(seconds: float) -> Failure:
    """Describe a call that ran past its deadline."""
    return Failure("TimeoutError", f"ran past --timeout {seconds:g} s")
