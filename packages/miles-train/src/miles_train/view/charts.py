"""Which charts a report shows, as plain data that `page/charts.js` draws."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from miles_train.view.gaps import ALARMING_GAP, gap_charts
from miles_train.view.metric_words import CAUSE, REWARD_PART, explain
from miles_train.view.one_chart import one_chart
from miles_train.view.series import (
    Columns,
    eval_datasets,
    moving_average,
    phase_colors,
    phase_names,
    rounded,
    total_seconds,
)

if TYPE_CHECKING:
    from miles_train.view.run_directory import RunDirectory

__all__ = ["chart_data"]

MOST_POINTS = 600
MOST_BARS = 120
MOST_OTHER_CHARTS = 80
FEWEST_TO_SMOOTH = 10

_EVAL_COLORS = (2, 5, 3, 6, 4, 7)
_COLORS = 8


def chart_data(run: RunDirectory) -> dict[str, Any]:
    """Return `x` columns and the charts of each section: `reward`, `rollout`, `train`, `gap`, `time`, `more`."""
    return _Charts(run).data()


class _Charts:
    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.points = Columns(run.rollouts, MOST_POINTS)
        self.bars = Columns(run.rollouts, MOST_BARS)
        self.evals = Columns(run.evals, MOST_POINTS)
        self.names = dict.fromkeys(name for record in run.rollouts for name in record.metrics)
        self.drawn: set[str] = set()

    def data(self) -> dict[str, Any]:
        sections = {
            "reward": [self.reward(), self.reward_parts()],
            "rollout": self.rollout(),
            "train": self.train(),
            "gap": [self.gap(), *gap_charts(self.run, self.points), *self.mismatch()],
            "time": [self.time(), self.speed()],
        }
        sections["more"] = self.more()
        columns = {"rollout": self.points, "bar": self.bars, "eval": self.evals}
        return {
            "x": {name: {"first": c.x, "last": c.x_last} for name, c in columns.items()},
            "sections": {name: [chart for chart in charts if chart["series"]] for name, charts in sections.items()},
        }

    def line(self, metric: str, label: str, color: int = 1) -> list[dict[str, Any]]:
        """Return one series, or none where the run has no such metric."""
        if metric not in self.names:
            return []
        self.drawn.add(metric)
        return [{"name": label, "x": "rollout", "color": color, "style": "line", **self.points.metric(metric)}]

    def counted(self, metric: str, label: str, color: int) -> dict[str, Any]:
        """Return one series of a count that a rollout leaves out where it is 0."""
        self.drawn.add(metric)
        column = self.points.values([record.metrics.get(metric, 0.0) for record in self.run.rollouts])
        return {"name": label, "x": "rollout", "color": color, "style": "line", **column}

    def held_out(self, metric: str, label: str) -> list[dict[str, Any]]:
        """Return one series of points for each evaluated dataset that has this metric."""
        datasets = eval_datasets(self.run.evals)
        series = []
        for place, dataset in enumerate(datasets):
            column = self.evals.metric(f"eval/{dataset}/{metric}")
            if any(value is not None for value in column["y"]):
                color = _EVAL_COLORS[place % len(_EVAL_COLORS)]
                name = f"{label}: {dataset}" if len(datasets) > 1 else label
                series.append({"name": name, "x": "eval", "color": color, "style": "dots", **column})
        return series

    def reward(self) -> dict[str, Any]:
        train = self.line("rollout/reward", "training reward")
        smooth: list[dict[str, Any]] = []
        if train and len(self.run.rollouts) >= FEWEST_TO_SMOOTH:
            reach = min(25, max(2, len(self.run.rollouts) // 40))
            means = moving_average([r.metrics.get("rollout/reward") for r in self.run.rollouts], reach)
            column = {"y": self.points.values(means)["y"]}
            smooth = [
                {"name": f"mean over {2 * reach + 1} rollouts", "x": "rollout", "color": 1, "style": "line", **column}
            ]
            train[0]["style"] = "faint"
        series = [*train, *smooth, *self.held_out("reward", "held-out reward")]
        return one_chart("Reward", series, tall=True, unit="")

    def reward_parts(self) -> dict[str, Any]:
        parts = [name for name in self.names if name.startswith(REWARD_PART)]
        series = [
            one
            for i, name in enumerate(parts)
            for one in self.line(name, name.removeprefix(REWARD_PART), 1 + i % _COLORS)
        ]
        return one_chart("Reward, by part", series, text="Mean of each part, before any weight.", unit="")

    def rollout(self) -> list[dict[str, Any]]:
        lengths = [
            *self.line("rollout/response_length_max", "longest", 7),
            *self.line("rollout/response_length", "mean", 1),
            *self.held_out("response_length", "held-out"),
        ]
        truncated = [*self.line("rollout/truncated", "training", 1), *self.held_out("truncated", "held-out")]
        equal = self.line("rollout/equal_groups", "equal groups", 1)
        dropped = [name for name in self.names if name.startswith("rollout/dropped/")]
        reasons = [
            self.counted(name, name.removeprefix("rollout/dropped/"), 1 + i % _COLORS) for i, name in enumerate(dropped)
        ]
        return [
            one_chart("Response length", lengths, "tokens", zero=True),
            one_chart("Truncated responses", truncated, "share", zero=True),
            one_chart(
                "Groups with equal rewards",
                equal,
                "share",
                zero=True,
                text=explain("rollout/equal_groups"),
            ),
            one_chart("Dropped, by reason", reasons, zero=True),
        ]

    def train(self) -> list[dict[str, Any]]:
        norms = [
            *self.line("train/grad_norm", "before clipping", 1),
            *self.line("train/critic_grad_norm", "of the critic", 3),
        ]
        rates = [*self.line("train/lr", "learning rate", 1), *self.line("train/critic_lr", "of the critic", 3)]
        values = [*self.line("train/value_loss", "value loss", 3)]
        packing = [
            *self.line("train/micro_batch_fill", "micro-batch fill", 1),
            *self.line("train/padding_share", "padding", 5),
            *self.line("train/dp_imbalance", "imbalance of ranks", 2),
        ]
        return [
            one_chart("Loss", self.line("train/loss", "loss")),
            one_chart("Gradient norm", norms, zero=True),
            one_chart("Learning rate", rates, zero=True),
            one_chart("Entropy", self.line("train/entropy", "entropy"), "nats"),
            one_chart("Value loss of the critic", values, zero=True),
            self.explained("Explained variance of the critic", "train/explained_variance", 3),
            one_chart("Samples left out", self.happened("train/samples_skipped", "samples left out", 1), zero=True),
            self.without_effect(),
            self.clipping(),
            self.kl(),
            one_chart(
                "Micro-batches and ranks",
                packing,
                "share",
                zero=True,
                text="How full micro-batches are (above 100 % where one sample is longer), what attention computes for "
                "no token, and how much longer the busiest rank works than the mean.",
            ),
        ]

    def without_effect(self) -> dict[str, Any]:
        """Show how many steps changed nothing, by cause where there was one."""
        causes = [name for name in self.names if name.startswith(CAUSE)]
        by_cause = [self.counted(name, name.removeprefix(CAUSE), 2 + i % _COLORS) for i, name in enumerate(causes)]
        steps = [
            *self.happened("train/zero_gradient_steps", "changed nothing", 1),
            *self.happened("train/skipped_steps", "of them skipped", 5),
        ]
        text = " ".join(explain(name) for name in causes)
        return one_chart("Steps that changed nothing", [*steps, *(by_cause if steps else [])], zero=True, text=text)

    def happened(self, metric: str, label: str, color: int) -> list[dict[str, Any]]:
        """Return one series, or none where it is 0 in the whole run."""
        series = self.line(metric, label, color)
        return series if any(record.metrics.get(metric) for record in self.run.rollouts) else []

    def explained(self, title: str, metric: str, color: int) -> dict[str, Any]:
        """Show one metric, with what it says."""
        return one_chart(title, self.line(metric, title.partition(" of ")[0].lower(), color), text=explain(metric))

    def gap(self) -> dict[str, Any]:
        series = [
            *self.line("train/logprob_gap_max", "largest of any token", 2),
            *self.line("train/logprob_gap_mean", "mean", 1),
        ]
        line = {"y": ALARMING_GAP, "label": "1e-4"}
        return one_chart("Log-prob gap, trainer against rollout", series, "nats", log=True, lines=[line], wide=True)

    def mismatch(self) -> list[dict[str, Any]]:
        divergences = [
            *self.line("train/mismatch_k1", "k1", 1),
            *self.line("train/mismatch_k3", "k3", 2),
        ]
        shares = [
            *self.line("train/mismatch_ess", "of tokens", 1),
            *self.line("train/mismatch_ess_samples", "of responses", 2),
        ]
        return [
            one_chart("KL divergence, trainer against rollout", divergences, "nats", text=explain("train/mismatch_k1")),
            one_chart("Effective sample size", shares, "share", text=explain("train/mismatch_ess")),
        ]

    def clipping(self) -> dict[str, Any]:
        series = [
            *self.line("train/pg_clipfrac", "importance ratios", 1),
            *self.line("train/tis_clipfrac", "weights of the correction", 2),
            *self.line("train/value_clipfrac", "values", 3),
        ]
        text = "Share of tokens that a clip decides: near 0 it does nothing, far up most of the data loses its effect."
        return one_chart("Clip fraction", series, "share", zero=True, text=text)

    def kl(self) -> dict[str, Any]:
        series = [
            *self.line("train/ppo_kl", "old against new policy", 1),
            *self.line("train/kl_loss", "from the reference, in the loss", 2),
            *self.line("train/kl_reward", "from the reference, in rewards", 3),
            *self.line("train/opd_kl", "from the teacher", 4),
        ]
        text = (
            "How far the policy is, at the tokens it sampled, from the one before the rollout's steps, from the "
            "reference model and from the teacher."
        )
        return one_chart("KL divergence", series, "nats", text=text)

    def time(self) -> dict[str, Any]:
        series = []
        names = phase_names(self.run.rollouts)
        colors = phase_colors(names)
        for name in names:
            column = self.bars.values([record.seconds.get(name, 0.0) for record in self.run.rollouts])
            series.append(
                {
                    "name": name.replace("_", " "),
                    "x": "bar",
                    "color": f"phase{colors[name]}",
                    "style": "bar",
                    "y": column["y"],
                }
            )
        return one_chart("Seconds of each rollout, by phase", series, "s", zero=True, wide=True)

    def speed(self) -> dict[str, Any]:
        records = self.run.rollouts
        counts = [record.metrics.get("rollout/tokens") for record in records]
        loop = [_per(n, total_seconds(record)) for n, record in zip(counts, records, strict=True)]
        generation = [_per(n, record.seconds.get("generate")) for n, record in zip(counts, records, strict=True)]
        series = [
            {"name": name, "x": "rollout", "color": color, "style": "line", **self.points.values(values)}
            for name, color, values in (("generation alone", 2, generation), ("whole loop", 1, loop))
            if any(value is not None for value in values)
        ]
        return one_chart("Tokens per second", series, "tok/s", zero=True, wide=True)

    def more(self) -> list[dict[str, Any]]:
        """Return a chart for every number that no other chart shows, such as those a hook reports."""
        shown = re.compile(r"eval/.+/(reward|truncated|response_length)")
        rollout = [
            one_chart(name, self.line(name, name.rpartition("/")[2]), text=explain(name))
            for name in sorted(set(self.names) - self.drawn)
        ]
        evaluated = sorted({name for record in self.run.evals for name in record.metrics if not shown.fullmatch(name)})
        held_out = [
            one_chart(
                name,
                [
                    {
                        "name": name.rpartition("/")[2],
                        "x": "eval",
                        "color": 2,
                        "style": "dots",
                        **self.evals.metric(name),
                    }
                ],
            )
            for name in evaluated
        ]
        return [*rollout, *held_out][:MOST_OTHER_CHARTS]


def _per(amount: float | None, seconds: float | None) -> float | None:
    return rounded(amount / seconds) if amount is not None and seconds else None
