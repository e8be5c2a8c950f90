"""Make this example's prompts and model below data/, with the tools of the quickstart's prepare.py.

The same tiny Qwen3, with letters for three kinds of prompts, and a supervised warm-up on random answers to each: a
solver and a rewriter write the digits in any order, a selector repeats any answer. Nothing of the task is in it.
"""

import argparse
import importlib.util
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
CHARACTERS = "0123456789> cfikoprstx"
TRAIN, WARM_UP = 4000, 25600
HELD_OUT = {3: 24, 4: 24, 5: 24, 6: 24, 7: 32}


def load_quickstart():
    """Import ../quickstart/prepare.py under another name."""
    spec = importlib.util.spec_from_file_location("quickstart_prepare", HERE.parent / "quickstart" / "prepare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def shuffled(rng: random.Random, digits: str) -> str:
    return "".join(rng.sample(digits, len(digits)))


def warm_up_line(rng: random.Random, digits: str) -> tuple[str, str]:
    """Return a prompt of a random role, and an answer that is right by chance at most."""
    answers = [shuffled(rng, digits) for _ in range(rng.randint(2, 4))]
    role = rng.choice(("sort", "fix", "pick"))
    if role == "sort":
        return f"sort {digits}>", shuffled(rng, digits)
    if role == "fix":
        return f"fix {digits} {' '.join(answers)}>", shuffled(rng, digits)
    return f"pick {digits} {' '.join(answers)}>", rng.choice(answers)


def write_lines(file: Path, rows: list[tuple[str, str]]) -> None:
    """Write prompt and label as JSON lines."""
    file.write_text("".join(json.dumps({"prompt": prompt, "label": label}) + "\n" for prompt, label in rows))
    print(f"{file}: {len(rows)} lines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "data")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--warm-up", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    quickstart, rng = load_quickstart(), random.Random(options.seed)
    held_out: set[str] = set()
    for length, count in HELD_OUT.items():
        while sum(len(digits) == length for digits in held_out) < count:
            held_out.add(quickstart.digits(rng, length))
    drawn = (quickstart.digits(rng, rng.choice(list(HELD_OUT))) for _ in range(2 * (TRAIN + WARM_UP)))
    others = [digits for digits in drawn if digits not in held_out]

    quickstart.make_model(options.out / "model", options.seed, CHARACTERS)
    write_lines(options.out / "train.jsonl", [(d, "".join(sorted(d))) for d in others[:TRAIN]])
    write_lines(options.out / "heldout.jsonl", [(d, "".join(sorted(d))) for d in sorted(held_out)])
    write_lines(options.out / "warmup.jsonl", [warm_up_line(rng, d) for d in others[TRAIN : TRAIN + WARM_UP]])
    if options.warm_up:
        quickstart.warm_up(options.out, options.seed, steps=400)


if __name__ == "__main__":
    main()
