"""Does the quickstart learn whatever the seed: new model, prompts, order and sampling for each."""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"


def learn(seed: int, folder: Path) -> dict[str, float]:
    """Prepare, warm up and train with one seed; return the ends of its curves and the largest log-prob gap."""
    prepare = [sys.executable, QUICKSTART / "prepare.py", "--out", folder, "--seed", str(seed)]
    subprocess.run(prepare, check=True, capture_output=True)
    options = {
        "hf-checkpoint": folder / "warm", "prompt-data": folder / "train.jsonl",
        "eval-prompt-data": folder / "heldout.jsonl", "run-dir": folder / "run", "seed": seed, "rollout-seed": seed,
    }  # fmt: skip
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    train = [sys.executable, "-m", "miles_api.cli", "train", QUICKSTART / "run.toml", *flags]
    subprocess.run(train, check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rollouts = [line["metrics"] for line in lines if line["kind"] == "rollout"]
    held_out = [line["metrics"]["eval/heldout/reward"] for line in lines if line["kind"] == "eval"]
    rewards = [row["rollout/reward"] for row in rollouts]
    return {
        "first": rewards[0],
        "last 10": statistics.mean(rewards[-10:]),
        "held out before": held_out[0],
        "held out after": held_out[-1],
        "largest gap": max(row.get("train/logprob_gap_max", 0.0) for row in rollouts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    for seed in parser.parse_args().seeds:
        with tempfile.TemporaryDirectory() as folder:
            numbers = learn(seed, Path(folder))
        print(f"seed {seed}: " + ", ".join(f"{name} {value:.3g}" for name, value in numbers.items()), flush=True)


if __name__ == "__main__":
    main()
