"""What the report says of tokens on which trainer and engines disagree: by engine, by version of weights, the worst."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec

from miles_train.token_gap_types import BINS_PER_DECADE, LOWEST_DECADE, Source
from miles_train.view.one_chart import one_chart
from miles_train.view.token_text import TokenText
from miles_train.view.words import number, percent

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from miles_train.token_gap_types import WorstToken
    from miles_train.view.gap_lines import GapLine
    from miles_train.view.run_directory import RunDirectory
    from miles_train.view.series import Columns

__all__ = ["ALARMING_GAP", "GapPage", "gap_charts", "gap_page"]

ALARMING_GAP = 1e-4
MOST_ROWS = 8
MOST_WORST = 12
MOST_ENGINE_LINES = 8

_FEW = 1e-3
"""A share of the tokens below which a bin is drawn as a hairline."""
_SEVERAL = 2
_LARGEST = 700.0
"""A log-prob whose probability is still a float."""
_BAR, _TALL, _WIDE = 8, 26, 4
"""Pixels: the width of a bin, the heights of a histogram's drawing and of its least bar."""


class Row(msgspec.Struct):
    """One engine, one version, or all of them."""

    name: str
    tokens: str
    mean: str
    bias: str
    typical: str
    """The gap that 99 % of the tokens are below."""
    largest: str
    alarming: str
    """The share of tokens above `ALARMING_GAP`."""
    bars: list[tuple[int, float, str]]
    """x, height and title of each bin that has tokens."""
    bad: bool


class Table(msgspec.Struct):
    """Rows of one kind."""

    title: str
    rows: list[Row]
    note: str = ""


class Worst(msgspec.Struct):
    """One of the worst tokens, with the text around it."""

    gap: str
    trainer: str
    rollout: str
    where: str
    engine: str
    version: str
    before: str
    token: str
    after: str


class GapPage(msgspec.Struct):
    """Everything about gaps beside the charts."""

    tables: list[Table]
    worst: list[Worst]
    ticks: list[tuple[int, str]]
    """x and label of the histograms' common axis."""
    width: int
    rollouts: int


def gap_page(run: RunDirectory) -> GapPage | None:
    """Return tables and worst tokens; None for a run that compared nothing."""
    lines = run.gaps
    sources = [source for line in lines for source in line.sources]
    if not sources:
        return None
    scale = _Scale(sources)
    everything = _summed(sources, lambda _: "all tokens")
    engines = _summed(sources, lambda source: source.engine or "not told")
    versions = _summed(sources, lambda source: source.version or "not told")
    tables = [Table("", [scale.row(*one) for one in everything.items()])]
    if len(engines) >= _SEVERAL:
        tables.append(scale.table("Engine", engines, in_order=False))
    if len(versions) >= _SEVERAL:
        tables.append(scale.table("Weights", versions, in_order=True))
    text = TokenText(run.config, run.path)
    tokens = [(line.rollout_id, token) for line in lines for token in line.worst]
    tokens.sort(key=lambda pair: -pair[1].gap)
    worst = [_worst(rollout_id, token, text) for rollout_id, token in tokens[:MOST_WORST]]
    return GapPage(tables, worst, scale.ticks(), scale.width, len(lines))


def gap_charts(run: RunDirectory, points: Columns) -> list[dict[str, Any]]:
    """Return the charts over rollouts: how gaps are spread, and the mean of each engine's."""
    by_rollout = {line.rollout_id: line for line in run.gaps}
    lines = [by_rollout.get(record.rollout_id) for record in run.rollouts]
    whole = [_whole(line) for line in lines]
    spread = [
        _series(
            f"{percent(share).replace('.0', '')} of tokens below", color, points, [_at(one, share) for one in whole]
        )
        for share, color in ((0.5, 1), (0.99, 4), (0.999, 2))
    ]
    engines = _summed((source for line in run.gaps for source in line.sources), lambda source: source.engine)
    means = [
        _series(engine or "not told", 1 + place % 8, points, [_mean_of(line, engine) for line in lines])
        for place, (engine, _) in enumerate(_worst_first(engines)[:MOST_ENGINE_LINES])
    ]
    text = "Gaps that half, 99 % and 99.9 % of a rollout's tokens are below."
    charts = [one_chart("Gap of tokens", [one for one in spread if _any(one)], "nats", log=True, text=text)]
    if len(engines) >= _SEVERAL:
        said = "An engine that stands out serves other weights, or computes otherwise."
        charts.append(one_chart("Mean gap, by engine", means, "nats", log=True, text=said))
    return charts


class _Scale:
    """The common logarithmic axis of all histograms: from the first bin that any token is in to the last."""

    def __init__(self, sources: Sequence[Source]) -> None:
        used = [place for source in sources for place, count in enumerate(source.bins) if count]
        shown = [*used, self._place(ALARMING_GAP)]
        self._first, self._last = min(shown), max(shown)
        self.width = (self._last - self._first + 1) * _BAR

    def table(self, title: str, summed: dict[str, Source], *, in_order: bool) -> Table:
        """Return the rows with the largest mean gaps, in order of appearance or of their gaps."""
        worst = _worst_first(summed)[:MOST_ROWS]
        kept = dict(worst)
        shown = [(name, one) for name, one in summed.items() if name in kept] if in_order else worst
        left = len(summed) - len(shown)
        note = f"{left:,} more, with smaller mean gaps, are not shown." if left else ""
        return Table(title, [self.row(name, one) for name, one in shown], note)

    def row(self, name: str, one: Source) -> Row:
        """Describe the tokens of one source."""
        largest = max(one.bins)
        bars = [
            (
                (place - self._first) * _BAR,
                round(max(_WIDE / 2, _TALL * count / largest), 1),
                self._title(place, count, one),
            )
            for place, count in enumerate(one.bins)
            if count
        ]
        above = sum(one.bins[self._place(ALARMING_GAP) :]) / one.tokens
        return Row(
            name=name,
            tokens=f"{one.tokens:,}",
            mean=number(one.gap / one.tokens),
            bias=number(one.log_ratio / one.tokens),
            typical=number(_below(one, 0.99)),
            largest=number(one.largest),
            alarming=percent(above) if above == 0 or above >= _FEW else "< 0.1 %",
            bars=bars,
            bad=above > 0,
        )

    def ticks(self) -> list[tuple[int, str]]:
        """Return the decades on the axis; their labels are powers of ten."""
        edges = [place for place in range(max(1, self._first), self._last + 2) if (place - 1) % BINS_PER_DECADE == 0]
        found = [
            ((place - self._first) * _BAR, f"1e{LOWEST_DECADE + (place - 1) // BINS_PER_DECADE}") for place in edges
        ]
        step = max(1, math.ceil(len(found) / 6))
        return found[::step]

    def _place(self, gap: float) -> int:
        """Return the first bin whose gaps are at least this."""
        return 1 + round((math.log10(gap) - LOWEST_DECADE) * BINS_PER_DECADE)

    def _title(self, place: int, count: int, one: Source) -> str:
        upper, lower = number(_edge(place)), number(_edge(place - 1))
        if place == 0:
            span = f"below {upper}"
        elif place == len(one.bins) - 1:
            span = f"{lower} or more"
        else:
            span = f"{lower} to {upper}"
        return f"{span} nats: {count:,} tokens, {percent(count / one.tokens)}"


def _summed(sources: Iterable[Source], name_of: Any) -> dict[str, Source]:
    """Add up the sources that have the same name, in order of appearance."""
    summed: dict[str, Source] = {}
    for source in sources:
        name = name_of(source)
        summed.setdefault(name, Source(engine="", version="", bins=[0] * len(source.bins))).add(source)
    return summed


def _worst_first(summed: dict[str, Source]) -> list[tuple[str, Source]]:
    return sorted(summed.items(), key=lambda item: -item[1].gap / item[1].tokens)


def _edge(place: int) -> float:
    """Return the upper edge of a bin."""
    return 10 ** (LOWEST_DECADE + place / BINS_PER_DECADE)


def _below(one: Source, share: float) -> float:
    """Return the upper edge of the bin in which the share is reached, or the largest gap if that is smaller."""
    left = share * one.tokens
    for place, count in enumerate(one.bins[:-1]):
        left -= count
        if left <= 0:
            return min(one.largest, _edge(place))
    return one.largest


def _whole(line: GapLine | None) -> Source | None:
    return _summed(line.sources, lambda _: "")[""] if line and line.sources else None


def _at(one: Source | None, share: float) -> float | None:
    # 0 has no place on a logarithmic axis.
    return _below(one, share) or None if one else None


def _mean_of(line: GapLine | None, engine: str) -> float | None:
    own = [source for source in line.sources if source.engine == engine] if line else []
    tokens = sum(source.tokens for source in own)
    return sum(source.gap for source in own) / tokens or None if tokens else None


def _series(name: str, color: int, points: Columns, values: Sequence[float | None]) -> dict[str, Any]:
    return {"name": name, "x": "rollout", "color": color, "style": "line", **points.values(values)}


def _any(series: dict[str, Any]) -> bool:
    return any(value is not None for value in series["y"])


def _worst(rollout_id: int, token: WorstToken, text: TokenText) -> Worst:
    before, own, after = text.around(token.tokens, token.at)
    return Worst(
        gap=number(token.gap),
        trainer=_probability(token.trainer),
        rollout=_probability(token.rollout),
        where=f"rollout {rollout_id:,}, sample {token.sample:,}, token {token.position + 1:,}",
        engine=token.engine,
        version=token.version,
        before=before,
        token=own,
        after=after,
    )


def _probability(log_prob: float) -> str:
    # What a hook says of the engine may be any number.
    return number(math.exp(min(log_prob, _LARGEST)))
