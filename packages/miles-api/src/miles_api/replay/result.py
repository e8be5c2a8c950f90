"""What a replay is asked for, and what it finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from miles_api.replay.subject import Failure

__all__ = ["Progress", "Replay", "Request", "note_failure"]

_FAILURES = 10
"""Failures that are kept with their text; the others are counted."""


class Request(msgspec.Struct, kw_only=True):
    """What to replay."""

    hook: str
    dump: str
    reference: str | None = None
    """None takes the recorded run's own."""
    limit: int | None = None
    """Most calls to make."""
    workers: int = 0
    """Processes; 0 stays in this one."""
    timeout: float = 60.0
    """Seconds that one call may take."""
    threshold: float = 0.5
    """Rewards above it are good ones."""
    shown: int = 5
    """Changes to list."""
    settings: dict[str, Any] = {}
    """Options that are other than in the recorded run."""


class Replay(msgspec.Struct, kw_only=True):
    """What came of it."""

    hook: str
    reference: str
    recorded_reference: str | None
    """What the recorded run named; None for a default."""
    dump: str
    unit: str
    """What one call was about: sample, group, rollout or batch."""
    how: str
    """Where the calls were made, in words."""
    calls: int = 0
    seconds: float = 0.0
    failed: int = 0
    changed: int = 0
    failures: list[dict[str, Any]] = []
    """The first ones: what the call was about, kind, message and frames."""
    slowest: list[dict[str, Any]] = []
    skipped: dict[str, int] = {}
    damage: str | None = None
    """What of the dump could not be read."""
    facts: dict[str, Any] = {}
    lines: list[str] = []
    """The facts in words."""


Progress = Callable[[int, int], None]
"""Called with how many calls are done and how many of them failed or changed something."""


def note_failure(result: Replay, what: str, failure: Failure) -> None:
    """Count a failure, and keep the first ones."""
    result.failed += 1
    if len(result.failures) < _FAILURES:
        result.failures.append({"what": what, **msgspec.structs.asdict(failure)})
