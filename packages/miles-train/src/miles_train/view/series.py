"""Turn records into the columns of numbers that charts draw, few enough for a page.

Ten thousand rollouts become a few hundred buckets of neighbours. A bucket keeps its mean, and its smallest and largest
value, so that a single spike is still seen.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from miles_train.view.run_directory import PHASES, Record

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "EVAL_NAME",
    "Columns",
    "eval_datasets",
    "moving_average",
    "phase_colors",
    "phase_names",
    "present",
    "rounded",
    "total_seconds",
]

# A part of the reward is named below it: `eval/<dataset>/reward/<part>`.
EVAL_NAME = re.compile(r"eval/(?P<dataset>.+?)/(?P<metric>reward/.+|[^/]+)")


class Columns:
    """Records as columns of at most `most` numbers."""

    def __init__(self, records: Sequence[Record], most: int) -> None:
        self._records = records
        self.width = max(1, math.ceil(len(records) / most))
        """How many records stand behind one number."""

    @property
    def x(self) -> list[int]:
        """The first rollout id of each bucket."""
        return [bucket[0] for bucket in self._buckets([record.rollout_id for record in self._records])]

    @property
    def x_last(self) -> list[int]:
        """The last rollout id of each bucket."""
        return [bucket[-1] for bucket in self._buckets([record.rollout_id for record in self._records])]

    def metric(self, name: str) -> dict[str, Any]:
        """Return one metric as `y`, with `lo` and `hi` where buckets hold several rollouts.

        `bad` lists the places in the column where the run wrote something that is not a finite number.
        """
        column = self.values([record.metrics.get(name) for record in self._records])
        bad = [name in record.metrics and record.metrics[name] is None for record in self._records]
        places = [place for place, bucket in enumerate(self._buckets(bad)) if any(bucket)]
        return {**column, "bad": places} if places else column

    def values(self, values: Sequence[float | None]) -> dict[str, Any]:
        """Return numbers, one a record, as `y` (and `lo`, `hi`)."""
        buckets = [present(bucket) for bucket in self._buckets(values)]
        column: dict[str, Any] = {"y": [rounded(_mean(bucket)) for bucket in buckets]}
        if self.width > 1:
            column["lo"] = [rounded(min(bucket, default=None)) for bucket in buckets]
            column["hi"] = [rounded(max(bucket, default=None)) for bucket in buckets]
        return column

    def _buckets(self, values: Sequence[Any]) -> list[Sequence[Any]]:
        return [values[start : start + self.width] for start in range(0, len(values), self.width)]


def moving_average(values: Sequence[float | None], reach: int) -> list[float | None]:
    """Return the mean of each value and its up to `reach` neighbours on either side, so that the curve does not lag."""
    sums, counts = [0.0], [0]
    for value in values:
        sums.append(sums[-1] + (value or 0.0))
        counts.append(counts[-1] + (value is not None))
    means: list[float | None] = []
    for place in range(len(values)):
        start, end = max(0, place - reach), min(len(values), place + reach + 1)
        count = counts[end] - counts[start]
        means.append((sums[end] - sums[start]) / count if count else None)
    return means


def eval_datasets(evals: Sequence[Record]) -> list[str]:
    """Return the names of the evaluated datasets, in order of appearance."""
    matches = (EVAL_NAME.fullmatch(name) for record in evals for name in record.metrics)
    return list(dict.fromkeys(match["dataset"] for match in matches if match))


def total_seconds(record: Record) -> float:
    """Return how long a rollout took: what it says, else the sum of its phases."""
    return record.seconds.get("total") or sum(record.seconds.values())


def phase_names(records: Sequence[Record]) -> list[str]:
    """Return the phases that took time, the usual ones first and `other` last."""
    seen = {name for record in records for name, value in record.seconds.items() if value > 0 and name != "total"}
    extra = sorted(seen.difference(PHASES))
    return [name for name in (*PHASES[:-1], *extra, PHASES[-1]) if name in seen]


def phase_colors(names: Sequence[str]) -> dict[str, int]:
    """Return the number of each phase's color; a usual phase has the same one in every report."""
    extra = [name for name in names if name not in PHASES]
    colors = {name: place + 1 for place, name in enumerate(PHASES)}
    return colors | {name: len(PHASES) + 1 + place % 2 for place, name in enumerate(extra)}


def present(values: Sequence[float | None]) -> list[float]:
    """Return the values that are there."""
    return [value for value in values if value is not None]


def rounded(value: float | None) -> float | None:
    """Return `value` with five significant digits: what a chart can show."""
    return None if value is None else float(f"{value:.5g}")


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
