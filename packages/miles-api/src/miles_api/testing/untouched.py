"""What a hook must leave as it was: taken down before the call, compared after it."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from miles_api.sample import Sample
    from miles_api.testing.trial import Trial

__all__ = ["IDENTITY", "READ_ONLY", "Untouched"]

IDENTITY = ("prompt", "label", "group_index", "index", "rollout_id")
"""What other hooks and a retry still need."""
READ_ONLY = (*IDENTITY, "tokens", "response", "response_length")
"""What a hook that only looks at finished samples has no business changing."""


class Untouched:
    """Remembers some fields of some samples."""

    def __init__(self, samples: Iterable[Sample], fields: tuple[str, ...] = READ_ONLY) -> None:
        self._fields = fields
        self._before: list[tuple[Sample, dict[str, Any]]] = [
            (sample, {field: copy.deepcopy(getattr(sample, field)) for field in fields}) for sample in samples
        ]

    def require(self, trial: Trial) -> None:
        """Fail, naming sample and field, where one differs."""
        for sample, before in self._before:
            for field in self._fields:
                now = getattr(sample, field)
                trial.require(
                    now == before[field],
                    f"changed it from {before[field]!r:.60} to {now!r:.60}",
                    sample=sample,
                    field=field,
                )
