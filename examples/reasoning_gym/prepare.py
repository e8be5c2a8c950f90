"""Make this example's prompts below data/: sums and differences from reasoning-gym, each with what its verifier needs.

`chain_sum` is one of reasoning-gym's hundred procedural tasks (arXiv 2505.24760). A line holds the question and, as
metadata, the whole entry, which `reward.py` hands to the task's own verifier. No held-out question is trained on.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

try:
    import reasoning_gym
    from reward import score
except ModuleNotFoundError as error:
    sys.exit(f"{error}: `hatch run reasoning-gym:train` installs what this example needs")

TASK = "chain_sum"
SIZES = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
TRAIN, HELD_OUT = 1000, 64
NONSENSE = "no answer at all"


def make_entries(seed: int) -> list[dict[str, Any]]:
    """Return enough entries, no question twice."""
    wanted = TRAIN + HELD_OUT
    dataset = reasoning_gym.create_dataset(TASK, seed=seed, size=4 * wanted, **SIZES)
    entries = list({entry["question"]: entry for entry in dataset}.values())
    # The few short questions come first, before they repeat: without this, held-out ones would be easier.
    random.Random(seed).shuffle(entries)
    return entries[:wanted]


def require_verifier(entries: list[dict[str, Any]]) -> None:
    """Stop where the verifier gives nonsense the marks of a right answer: a model would learn nonsense."""
    fooled = sum(score(NONSENSE, TASK, entry) >= 1 for entry in entries)
    if fooled:
        sys.exit(f"{TASK}: its verifier gives {NONSENSE!r} full marks on {fooled} of {len(entries)} questions")


def write_prompts(file: Path, entries: list[dict[str, Any]]) -> None:
    """Write one line for each entry: the question, to be continued, and the entry."""
    lines = [json.dumps({"prompt": entry["question"], "metadata": {"task": TASK, "entry": entry}}) for entry in entries]
    file.write_text("\n".join(lines) + "\n")
    print(f"{file}: {len(lines)} prompts, such as {entries[0]['question']!r} ({entries[0]['answer']})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    entries = make_entries(options.seed)
    require_verifier(entries[:HELD_OUT])
    write_prompts(options.out / "heldout.jsonl", entries[:HELD_OUT])
    write_prompts(options.out / "train.jsonl", entries[HELD_OUT:])


if __name__ == "__main__":
    main()
