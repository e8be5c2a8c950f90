"""Cross-package tests run the real stack: Ray, Megatron-Core, the local engine, the router."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
QUICKSTART = ROOT / "examples" / "quickstart"


@pytest.fixture(scope="session")
def quickstart_data(tmp_path_factory):
    """The quickstart's model (without the warm-up) and prompts."""
    folder = tmp_path_factory.mktemp("quickstart")
    subprocess.run(
        [sys.executable, str(QUICKSTART / "prepare.py"), "--out", str(folder), "--no-warm-up"], check=True, timeout=120
    )
    return folder


@pytest.fixture
def small_run(quickstart_data, tmp_path):
    """The quickstart's TOML as arguments, made small."""

    def arguments(**changes):
        values = {
            "hf_checkpoint": quickstart_data / "model", "prompt_data": quickstart_data / "train.jsonl",
            "eval_prompt_data": quickstart_data / "heldout.jsonl", "run_dir": tmp_path / "run", "num_rollout": 3,
            "rollout_batch_size": 4, "n_samples_per_prompt": 4, **changes,
        }  # fmt: skip
        flags = [word for key, value in values.items() for word in (f"--{key.replace('_', '-')}", str(value))]
        return [str(QUICKSTART / "run.toml"), *flags]

    return arguments
