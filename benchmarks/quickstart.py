"""The quickstart's job on Miles, on TRL and as a plain transformers script: ratios of time, CPU and time to a reward.

Run `hatch run prepare` first, and for TRL `hatch env create bench`; then
`hatch run python benchmarks/quickstart.py --trl-python "$(hatch env find bench)/bin/python"`.
The contestants take turns, so that other work on the machine hits all alike; medians over the repetitions.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from bisect import bisect_left
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent
HERE, QUICKSTART = ROOT / "benchmarks", ROOT / "examples" / "quickstart"
WARM_UP = 5
"""Rollouts that no figure but the time to the reward counts: caches fill, kernels are chosen."""
WINDOW, GOAL = 5, 0.8
"""The goal is reached with the first rollout at which the mean reward of the last five is at least 0.8."""
FIGURES = {"wall": "wall s a rollout", "cpu": "CPU s a rollout", "goal": f"s to reward {GOAL}",
           "rollouts": f"rollouts to {GOAL}", "start": "start-up, wall s", "start_cpu": "start-up, CPU s",
           "generate": "generation, wall s", "train": "training, wall s"}  # fmt: skip


class CpuWatch:
    """The CPU time of a process and all that descend from it, dead ones included, sampled in the background."""

    def __init__(self, process: int) -> None:
        self._root = psutil.Process(process)
        self._spent: dict[tuple[int, float], float] = {}
        self._times: list[float] = []
        self._sums: list[float] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            for process in self._tree():
                try:
                    used = process.cpu_times()
                    self._spent[process.pid, process.create_time()] = used.user + used.system
                except psutil.Error:
                    continue  # it ended just now: what it had used is kept
            self._times.append(time.time())
            self._sums.append(sum(self._spent.values()))

    def _tree(self) -> list[psutil.Process]:
        try:
            return [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            return []

    def stop(self) -> None:
        """Stop sampling."""
        self._done.set()
        self._thread.join()

    def until(self, moment: float) -> float:
        """Return the CPU seconds spent up to a Unix time, interpolated."""
        after = bisect_left(self._times, moment)
        if after in (0, len(self._times)):
            return self._sums[min(after, len(self._sums) - 1)]
        (t0, t1), (s0, s1) = self._times[after - 1 : after + 1], self._sums[after - 1 : after + 1]
        return s0 + (s1 - s0) * (moment - t0) / (t1 - t0)


def watched(words: list[object]) -> CpuWatch:
    """Run a program to its end, and return what it used; ends this one with what it said if it fails."""
    # one thread a process, and no busy waiting: two threads on two busy cores are up to 8 times slower than one
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen([str(word) for word in words], stdout=said, stderr=said, env=settings)
        watch = CpuWatch(process.pid)
        status = process.wait()
        watch.stop()
        if status:
            said.seek(0)
            raise SystemExit(f"{words} failed:\n{said.read().decode()}")
    return watch


def race(words: list[object], lines: Path) -> dict[str, float]:
    """Run one contestant, which writes one line a rollout; return its figures."""
    started = time.time()
    watch = watched(words)
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    return figures([as_row(row) for row in rows if row.get("kind", "rollout") == "rollout"], watch, started)


def as_row(line: dict[str, Any]) -> dict[str, Any]:
    """Read a line of a contestant or of a run's metrics.jsonl."""
    reward = line["metrics"]["rollout/reward"] if "metrics" in line else line["reward"]
    return {"time": line["time"], "reward": reward, "seconds": line.get("seconds", {})}


def figures(rows: list[dict[str, Any]], watch: CpuWatch, started: float) -> dict[str, float]:
    """Return a contestant's figures. The first rollout, whose beginning nobody notes, counts as a usual one."""
    ends = [row["time"] for row in rows]
    wall = statistics.median(b - a for a, b in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False))
    cpu = (watch.until(ends[-1]) - watch.until(ends[WARM_UP - 1])) / (len(ends) - WARM_UP)
    means = [statistics.mean(row["reward"] for row in rows[i : i + WINDOW]) for i in range(len(rows) - WINDOW + 1)]
    reached = next((i + WINDOW for i, mean in enumerate(means) if mean >= GOAL), None)
    found = {"wall": wall, "cpu": cpu, "start": ends[0] - wall - started, "start_cpu": watch.until(ends[0]) - cpu}
    if reached is not None:
        found |= {"goal": ends[reached - 1] - ends[0] + wall, "rollouts": float(reached)}
    for part in ("generate", "train"):
        if all(part in row["seconds"] for row in rows):
            found[part] = statistics.median(row["seconds"][part] for row in rows[WARM_UP:])
    return found


def contestants(options: argparse.Namespace, folder: Path) -> dict[str, tuple[list[object], Path]]:
    """Return the command of each contestant and the file its lines go to."""
    miles = [sys.executable, "-m", "miles_api.cli", "train", QUICKSTART / "run.toml", "--num-rollout",
             options.rollouts, "--eval-interval", 10**6, "--run-dir", folder / "run", "--overwrite",
             *options.flags]  # fmt: skip
    off = ["--no-skip-zero-advantage", "--no-use-rollout-logprobs"]
    lines = folder / "lines.jsonl"
    script = ["--data", QUICKSTART / "data", "--rollouts", options.rollouts, "--out", lines]
    found = {
        "miles": (miles, folder / "run" / "metrics.jsonl"),
        "miles, both off": ([*miles, *off], folder / "run" / "metrics.jsonl"),
        "plain script": ([sys.executable, HERE / "plain_grpo.py", *script], lines),
    }
    if options.trl_python:
        found["TRL"] = ([options.trl_python, HERE / "trl_grpo.py", *script], lines)
    return {name: found[name] for name in found if not options.only or name in options.only}


def show(results: dict[str, list[dict[str, float]]]) -> None:
    """Print medians over the repetitions, and Miles over each of the others."""
    medians = {
        name: {key: statistics.median(values) for key in FIGURES if (values := [r[key] for r in runs if key in r])}
        for name, runs in results.items()
    }
    rivals = [name for name in medians if not name.startswith("miles")]
    ratios = [(ours, rival) for rival in rivals for ours in medians if ours.startswith("miles")]
    heads = [*medians, *(f"{ours} ÷ {rival}" for ours, rival in ratios)]
    print("| |", " | ".join(heads), "|")
    print("|---|" + "---|" * len(heads))
    for key, title in FIGURES.items():
        cells = [f"{found[key]:.3g}" if key in found else "–" for found in medians.values()]
        pairs = [(medians[ours].get(key), medians[rival].get(key)) for ours, rival in ratios]
        cells += [f"{a / b:.2f}" if a is not None and b else "–" for a, b in pairs]
        print(f"| {title} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--trl-python", help="an interpreter with TRL; left out, TRL does not take part")
    parser.add_argument("--only", action="append", help="only this contestant, by the name in the table")
    parser.add_argument("flags", nargs="*", help="more flags of `miles train`, after --")
    options = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repetitions):
        with tempfile.TemporaryDirectory() as folder:
            for name, (words, lines) in contestants(options, Path(folder)).items():
                results.setdefault(name, []).append(race(words, lines))
                load = os.getloadavg()[0]
                print(f"{name} (load {load:.1f}):", {k: round(v, 3) for k, v in results[name][-1].items()}, flush=True)
    show(results)


if __name__ == "__main__":
    main()
