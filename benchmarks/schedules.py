"""The same run by each schedule: wall time a rollout, what each phase takes, and how busy the cores are.

    hatch run prepare
    hatch run python benchmarks/schedules.py [--schedules sync one-step-off] [--rollouts 12] [--repetitions 3]
        [-- more flags of `miles train`]

The quickstart's model and prompts with more answers a rollout, so that making one and training on it take about as
long, and what is between them is little. Schedules take turns, so that whatever else the machine does meets them all;
figures are medians over the rollouts of a run after the first few, then over its repetitions. Schedules are values of
`--rollout-schedule`; the first is what the others are divided by.

`possible` is what overlapping could give if it cost nothing: the longer of the two phases plus the rest, over all of
them in turn. The cores are `busy` by the CPU time of all of the run's processes: with two cores, of which rollout and
training use one each, it can hardly exceed 1 of 2 in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from quickstart import QUICKSTART, CpuWatch, watched

WARM_UP = 3
"""Rollouts that do not count: caches fill, kernels are chosen, the first one is never made ahead."""
SIZES = ["--rollout-batch-size", 128, "--num-steps-per-rollout", 2]
FIGURES = {
    "wall": "wall s a rollout",
    "generate": "waiting for a rollout, s",
    "made_in": "making a rollout, s",
    "train": "training, s",
    "rest": "the rest, s",
    "busy": "cores busy",
    "staleness": "versions that a rollout is behind",
}


def main() -> None:
    """Print a table with a column for each schedule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", nargs="+", default=["sync", "one-step-off"])
    parser.add_argument("--rollouts", type=int, default=12)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("flags", nargs="*", help="more flags of `miles train`, after --")
    options = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {schedule: [] for schedule in options.schedules}
    for _ in range(options.repetitions):
        for schedule, runs in found.items():
            with tempfile.TemporaryDirectory() as folder:
                runs.append(run(schedule, options.rollouts, options.flags, Path(folder) / "run"))
            load = os.getloadavg()[0]
            print(f"{schedule} (load {load:.1f}):", {k: round(v, 3) for k, v in runs[-1].items()}, flush=True)
    show({name: {key: statistics.median(run[key] for run in runs) for key in FIGURES} for name, runs in found.items()})


def run(schedule: str, rollouts: int, flags: list[str], run_dir: Path) -> dict[str, float]:
    """Run once and return its figures."""
    words = [sys.executable, "-m", "miles_api.cli", "train", QUICKSTART / "run.toml", "--run-dir", run_dir]
    words += ["--rollout-schedule", schedule, "--num-rollout", rollouts, "--eval-interval", 10**6, *SIZES, *flags]
    watch = watched(words)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return figures([line for line in lines if line["kind"] == "rollout"], watch)


def figures(rows: list[dict[str, Any]], watch: CpuWatch) -> dict[str, float]:
    """Return the figures of one run out of its rows of metrics."""
    rows = rows[WARM_UP - 1 :]
    begun, ended = rows[0]["time"], rows[-1]["time"]
    wall = statistics.median(after["time"] - before["time"] for before, after in pairwise(rows))
    middle = {key: statistics.median(phases(row)[key] for row in rows[1:]) for key in phases(rows[0])}
    return {
        **middle,
        "wall": wall,
        "rest": wall - middle["generate"] - middle["train"],
        "busy": (watch.until(ended) - watch.until(begun)) / (ended - begun),
    }


def phases(row: dict[str, Any]) -> dict[str, float]:
    """Return how long (s) the run waited for this rollout and trained on it, and how long the rollout itself took."""
    seconds, metrics = row["seconds"], row["metrics"]
    return {
        "generate": seconds["generate"],
        "train": seconds["train"],
        "made_in": metrics.get("rollout/made_in_seconds", seconds["generate"]),
        "staleness": metrics.get("rollout/staleness", 0.0),
    }


def show(medians: dict[str, dict[str, float]]) -> None:
    """Print the table, and each schedule's wall time over that of the first beside what is possible."""
    print("| |", " | ".join(medians), "|")
    print("|---|" + "---|" * len(medians))
    for key, title in FIGURES.items():
        print(f"| {title} |", " | ".join(f"{found[key]:.3g}" for found in medians.values()), "|")
    (base, first), *others = medians.items()
    for name, found in others:
        longest = max(first["generate"], first["train"]) + first["rest"]
        print(f"{name} ÷ {base}: {found['wall'] / first['wall']:.2f}; possible {longest / first['wall']:.2f}")


if __name__ == "__main__":
    main()
