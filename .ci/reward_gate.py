"""Fail unless a run's mean reward over its last ten rollouts reached a bound and trainer and engine agreed."""

import json
import sys
from pathlib import Path

LARGEST_GAP = 1e-4


def main(run_dir: str, bound: str) -> int:
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    metrics = [line["metrics"] for line in lines if line["kind"] == "rollout"]
    rewards = [row["rollout/reward"] for row in metrics]
    # A rollout in which every group agrees trains nothing, so nothing is compared.
    gap = max(row["train/logprob_gap_max"] for row in metrics if row["train/samples_skipped"] < row["rollout/samples"])
    held_out = [row["metrics"] for row in lines if row["kind"] == "eval"]
    final = sum(rewards[-10:]) / len(rewards[-10:])
    print(f"reward {rewards[0]:.2f} -> {final:.2f} (bound {bound}), log-prob gap {gap:.1e}, held out {held_out[-1]}")
    return int(final < float(bound) or gap > LARGEST_GAP)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
