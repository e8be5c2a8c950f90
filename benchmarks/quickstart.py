"""The quickstart's job on Miles and as a plain transformers script, one after the other: ratios of seconds per rollout.

Run `hatch run prepare` first. Start-up is reported apart. The machine should be idle.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"


def run(*words: object) -> str:
    """Run a program and return what it printed; its errors end the benchmark."""
    return subprocess.run([sys.executable, *map(str, words)], check=True, capture_output=True, text=True).stdout


def miles(rollouts: int, flags: list[str]) -> dict[str, Any]:
    """Train by the quickstart's TOML without evaluation; return medians over the rollouts after the first five."""
    with tempfile.TemporaryDirectory() as folder:
        words = ["--num-rollout", rollouts, "--run-dir", f"{folder}/run", "--eval-interval", 10**6, *flags]
        run("-m", "miles_api.cli", "train", QUICKSTART / "run.toml", *words)
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "rollout"]
    medians = {name: statistics.median(row["seconds"][name] for row in rows[5:]) for name in rows[0]["seconds"]}
    rewards = [row["metrics"]["rollout/reward"] for row in rows]
    (start_up,) = [line["seconds"] for line in lines if line["kind"] == "run"]
    return {**medians, "reward_last10": statistics.mean(rewards[-10:]), "start_up": start_up}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rollouts", type=int, default=120)
    parser.add_argument("flags", nargs="*", help="more flags of `miles train`, after --")
    options = parser.parse_args()
    plain = json.loads(run(Path(__file__).parent / "plain_grpo.py", "--data", QUICKSTART / "data", "--rollouts",
                           options.rollouts))  # fmt: skip
    ours = miles(options.rollouts, options.flags)
    print(f"plain script: {plain}")
    print(f"miles:        {ours}")
    for name in ("generate", "train", "total"):
        print(f"{name:9} miles / plain = {ours[name] / plain['seconds'][name]:.2f}")
    neither = 1 - (ours["generate"] + ours["train"]) / ours["total"]
    print(f"neither generation nor training: {neither:.1%} of a rollout")


if __name__ == "__main__":
    main()
