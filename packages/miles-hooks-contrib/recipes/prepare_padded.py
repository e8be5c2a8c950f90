"""Make the model of an experiment with lengths: it ends its answers with 0 to 12 spaces that nobody asked for.

`prepare_padded.py dr_grpo` makes dr_grpo/data, a model that answers `s` or `t` by chance; `prepare_padded.py
length_reward` makes length_reward/data, one that answers the digits in random order. The quickstart's data must be
there (`hatch run prepare`); takes half a minute.
"""

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
QUICKSTART = HERE.parents[2] / "examples" / "quickstart"
MOST_SPACES = 12
COIN = {"dr_grpo": "st", "length_reward": ""}
"""By experiment: of these characters an answer is one; if there are none, it is the digits in random order."""


def warm_up(out: Path, warmup: Path, seed: int) -> None:
    """Train the quickstart's random model on `warmup`; the result is `out`/warm."""
    flags = {
        "loss-type": "sft_loss", "hf-checkpoint": QUICKSTART / "data" / "model", "prompt-data": warmup,
        "eval-prompt-data": QUICKSTART / "data" / "heldout.jsonl",
        "num-rollout": 150, "rollout-batch-size": 64, "n-samples-per-prompt": 1, "num-steps-per-rollout": 1,
        "lr": 3e-3, "lr-decay-style": "cosine", "lr-warmup-iters": 10, "adam-beta2": 0.98, "seed": seed,
        "run-dir": out / "warmup-run", "save-hf": out / "warm",
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "miles_api.cli", "train", str(QUICKSTART / "run.toml"), *words, "--overwrite"]
    # Progress goes to stderr. What it prints besides, a plan and a report, is not the experiment's.
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    print(f"{out / 'warm'}: the model after a supervised warm-up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", choices=COIN)
    parser.add_argument("--out", type=Path, help="default: the experiment's data/")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    out = options.out or HERE / options.experiment / "data"
    rng, coin = random.Random(options.seed), COIN[options.experiment]
    out.mkdir(parents=True, exist_ok=True)
    rows = [json.loads(line) for line in (QUICKSTART / "data" / "warmup.jsonl").read_text().splitlines()]
    for row in rows:
        answer = rng.choice(coin) if coin else row["label"]
        row["label"] = answer + " " * rng.randint(0, MOST_SPACES)
    warmup = out / "warmup.jsonl"
    warmup.write_text("".join(json.dumps(row) + "\n" for row in rows))
    warm_up(out, warmup, options.seed)


if __name__ == "__main__":
    main()
