"""`miles check` on the quickstart, over `python -c 'import msgspec'` and over `miles --version`.

Makes the quickstart's model and prompts in a temporary directory first. The commands take turns, so that what else the
machine does hits all of them alike; medians are reported.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"


def seconds(words: list[str]) -> float:
    """Run a program that must succeed and return its wall-clock seconds."""
    started = time.perf_counter()
    subprocess.run([sys.executable, *words], check=True, capture_output=True)
    return time.perf_counter() - started


def commands(folder: Path) -> dict[str, list[str]]:
    """Return what is measured, by name."""
    flags = {"hf-checkpoint": "model", "prompt-data": "train.jsonl", "eval-prompt-data": "heldout.jsonl",
             "run-dir": "run"}  # fmt: skip
    run = [str(QUICKSTART / "run.toml"), *(f"--{flag}={folder / name}" for flag, name in flags.items())]
    return {
        "import msgspec": ["-c", "import msgspec"],
        "miles --version": ["-m", "miles_api.cli", "--version"],
        "miles check": ["-m", "miles_api.cli", "check", *run],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds([str(QUICKSTART / "prepare.py"), "--no-warm-up", "--out", folder])
        measured = commands(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in measured}
        for turn in range(options.repeat + 1):
            for name, words in measured.items():
                taken = seconds(words)
                if turn:  # the first turn fills the file cache
                    times[name].append(taken)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, median in medians.items():
        ratio = medians["miles check"] / median
        print(f"{name:16} {median:.3f} s" + (f"   miles check / this = {ratio:.1f}" if name != "miles check" else ""))


if __name__ == "__main__":
    main()
