"""What a report says in words and tables: tiles, shares of time, and what deserves a look."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

from miles_train.view.gaps import ALARMING_GAP
from miles_train.view.hook_table import HookTotals, hook_attention
from miles_train.view.metric_words import CAUSE, CAUSES, explain
from miles_train.view.series import eval_datasets, phase_colors, phase_names, present, total_seconds
from miles_train.view.words import duration, number, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from miles_train.view.run_directory import RunDirectory

__all__ = [
    "Number",
    "Share",
    "Tile",
    "TimeShares",
    "attention",
    "config_lines",
    "explained",
    "startup_text",
    "tiles",
    "time_shares",
]

LAST_ROLLOUTS = 10
MOST_DATASETS = 8

_GENERATE_AND_TRAIN = ("generate", "train")
_SECRET = re.compile(r"^(?P<key>\s*[\w\"-]*(?<![a-z])(token|password|secret|api_key)\"?\s*=\s*).*$", re.IGNORECASE)
_REMARK = re.compile(r"^(?P<code>.*?)(?P<remark>\s*#[^\"']*)?$")


class Tile(msgspec.Struct):
    """One headline number."""

    label: str
    value: str
    before: str = ""
    """What the number was at first; shown before it, with an arrow."""
    under: str = ""
    bad: bool = False


def tiles(run: RunDirectory) -> list[Tile]:
    """Return the headline numbers that this run has."""
    shown = [_reward_tile(run), *_held_out_tiles(run), Tile("Rollouts", f"{len(run.rollouts):,}")]
    if run.started is not None and run.finished is not None:
        shown.append(Tile("Duration", duration(run.finished - run.started)))
    shown += [_tokens_tile(run), _gap_tile(run)]
    return [tile for tile in shown if tile is not None]


def _values(run: RunDirectory, metric: str) -> list[float]:
    return present([record.metrics.get(metric) for record in run.rollouts])


def _reward_tile(run: RunDirectory) -> Tile | None:
    rewards = _values(run, "rollout/reward")
    if not rewards:
        return None
    last = rewards[-LAST_ROLLOUTS:]
    under = f"mean of the last {len(last)}" if len(last) > 1 else "of the only rollout"
    return Tile(
        "Training reward",
        number(sum(last) / len(last)),
        before=number(rewards[0]) if len(last) > 1 else "",
        under=under,
    )


def _held_out_tiles(run: RunDirectory) -> list[Tile]:
    found = []
    for dataset in eval_datasets(run.evals)[:MOST_DATASETS]:
        name = f"eval/{dataset}/reward"
        records = [record for record in run.evals if record.metrics.get(name) is not None]
        if records:
            first, last = records[0], records[-1]
            before = number(first.metrics[name]) if first is not last else ""
            found.append(
                Tile(
                    f"Held-out: {dataset}",
                    number(last.metrics[name]),
                    before=before,
                    under=f"after rollout {last.rollout_id:,}" if last.rollout_id >= 0 else "before training",
                )
            )
    return found


def _tokens_tile(run: RunDirectory) -> Tile | None:
    tokens = sum(_values(run, "rollout/tokens"))
    seconds = sum(total_seconds(record) for record in run.rollouts)
    if not tokens:
        return None
    return Tile("Tokens", _short(tokens), under=f"{number(tokens / seconds)} a second" if seconds else "")


def _gap_tile(run: RunDirectory) -> Tile | None:
    gaps = _values(run, "train/logprob_gap_max")
    if not gaps:
        return None
    return Tile("Log-prob gap", number(max(gaps)), under="largest of any token", bad=max(gaps) > ALARMING_GAP)


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if count >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:,.0f}"


class Number(msgspec.Struct):
    """One metric of the run."""

    name: str
    last: str
    words: str


class Share(msgspec.Struct):
    """One phase's part of the time."""

    name: str
    seconds: str
    share: str
    width: str
    """Its part of the drawn bar, as a CSS length."""
    color: int


class TimeShares(msgspec.Struct):
    """Where the time of all rollouts went."""

    total: str
    parts: list[Share]
    neither: str
    """The share that is neither generation nor training."""
    inside: str
    """What that share is made of."""


def time_shares(run: RunDirectory) -> TimeShares | None:
    """Add up the phases of all rollouts; None where no time was recorded."""
    sums = {name: sum(record.seconds.get(name, 0.0) for record in run.rollouts) for name in phase_names(run.rollouts)}
    # Phases that overlap (generation during training) add up to more than the wall clock: shares are of all work.
    total = max(sum(total_seconds(record) for record in run.rollouts), sum(sums.values()))
    if not total:
        return None
    colors = phase_colors(list(sums))
    parts = [
        Share(
            name.replace("_", " "),
            duration(seconds),
            percent(seconds / total),
            f"{100 * seconds / total:.2f}%",
            colors[name],
        )
        for name, seconds in sums.items()
    ]
    rest = {name: seconds for name, seconds in sums.items() if name not in _GENERATE_AND_TRAIN}
    neither = 1 - sum(sums.get(name, 0.0) for name in _GENERATE_AND_TRAIN) / total
    in_order = sorted(rest.items(), key=lambda item: -item[1])
    inside = ", ".join(f"{name.replace('_', ' ')} {percent(seconds / total)}" for name, seconds in in_order)
    return TimeShares(duration(total), parts, percent(max(0.0, neither)), inside)


def startup_text(run: RunDirectory) -> str:
    """Return the start-up phases in words; some go on at the same time, so that their sum says nothing."""
    return ", ".join(f"{name.replace('_', ' ')} {duration(seconds)}" for name, seconds in run.startup.items())


def attention(run: RunDirectory, hooks: Sequence[HookTotals]) -> list[str]:
    """Return what a reader should not overlook."""
    found = list(run.problems)
    bad: dict[str, list[int]] = {}
    for record in (*run.rollouts, *run.evals):
        for name, value in record.metrics.items():
            if value is None:
                bad.setdefault(name, []).append(record.rollout_id)
    found += [f"{name} was not finite in {_rollouts(ids)}" for name, ids in bad.items()]
    above = [r.rollout_id for r in run.rollouts if (r.metrics.get("train/logprob_gap_max") or 0) > ALARMING_GAP]
    if above:
        found.append(f"the log-prob gap was above 1e-4 in {_rollouts(above)}")
    found += _without_effect(run)
    found += hook_attention(hooks, has_rollouts=bool(run.rollouts))
    return found


def _without_effect(run: RunDirectory) -> list[str]:
    """Say of optimizer steps that changed nothing how many there were, and why."""
    found = []
    for cause, why in CAUSES.items():
        counts = {record.rollout_id: record.metrics.get(CAUSE + cause) or 0.0 for record in run.rollouts}
        ids = [rollout_id for rollout_id, count in counts.items() if count]
        if ids:
            steps = sum(counts.values())
            found.append(f"{steps:,.0f} optimizer step{'s' * (steps > 1)} changed nothing, in {_rollouts(ids)}: {why}")
    return found


def explained(run: RunDirectory) -> list[Number]:
    """Return every number that the run reported, the last of each, and what it says."""
    last: dict[str, float | None] = {}
    for record in (*run.rollouts, *run.evals):
        last |= record.metrics
    return [Number(name, number(last[name]), explain(name) or "Reported by a hook.") for name in sorted(last)]


def _rollouts(ids: Sequence[int]) -> str:
    return f"rollout {ids[0]:,}" if len(ids) == 1 else f"{len(ids):,} rollouts, first in {ids[0]:,}"


def config_lines(text: str) -> list[tuple[str, str, bool]]:
    """Return each line's code, its remark, and whether it opens a table; values of secret keys are left out."""
    lines = []
    for line in text.splitlines():
        shown = _SECRET.sub(r"\g<key>(not shown)", line)
        match = _REMARK.match(shown)
        code, remark = (match["code"], match["remark"] or "") if match else (shown, "")
        lines.append((code, remark, code.startswith("[")))
    return lines
