"""Make the model of the experiment with lengths below data/: it answers `s` or `t` by chance, then 0 to 12 spaces.

The quickstart's data must be there (`hatch run prepare`); takes half a minute.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parents[4] / "examples" / "quickstart"
MOST_SPACES = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "warmup.jsonl").read_text().splitlines()]
    for row in rows:
        row["label"] = rng.choice("st") + " " * rng.randint(0, MOST_SPACES)
    warmup = options.out / "warmup.jsonl"
    warmup.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = {
        "loss-type": "sft_loss", "hf-checkpoint": QUICKSTART / "data" / "model", "prompt-data": warmup,
        "eval-prompt-data": QUICKSTART / "data" / "heldout.jsonl",
        "num-rollout": 150, "rollout-batch-size": 64, "n-samples-per-prompt": 1, "num-steps-per-rollout": 1,
        "lr": 3e-3, "lr-decay-style": "cosine", "lr-warmup-iters": 10, "adam-beta2": 0.98, "seed": options.seed,
        "run-dir": options.out / "warmup-run", "save-hf": options.out / "warm",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "miles_api.cli", "train", str(QUICKSTART / "run.toml"), *words, "--overwrite"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{options.out / 'warm'}: the model after a supervised warm-up")


if __name__ == "__main__":
    main()
