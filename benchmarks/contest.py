"""What every opponent in `quickstart.py` shares: the sizes of the job and the command line."""

import argparse
from pathlib import Path

PROMPTS, GROUP, STEPS, NEW_TOKENS = 32, 8, 2, 8
CLIP_LOW, CLIP_HIGH, LEARNING_RATE = 0.2, 0.28, 5e-4


def options(description: str | None) -> argparse.Namespace:
    """Read `--data`, `--rollouts` and `--out`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True, help="the quickstart's data/ after its warm-up")
    parser.add_argument("--rollouts", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True, help="where the lines go")
    return parser.parse_args()
