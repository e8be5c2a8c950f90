"""Trainer and engines in turns on the same slots, and rollouts one step ahead of training: whole runs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from miles_api.record import read_dump
from miles_api.rollout_types import flatten

BATCH, ROLLOUTS = 4, 4
# The model without warm-up sorts nothing: rewards that differ let it learn something.
REWARD = """
def score(args, sample):
    return float(sum(sample.tokens) % 3)
"""


def rows_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "rollout"]


FLAGS = {
    "colocated": ["--colocate"],
    "one-step-off": ["--rollout-schedule", "one-step-off"],
    "in-flight": ["--rollout-schedule", "in-flight", "--partial-rollout", "--over-sampling-batch-size", str(2 * BATCH)],
}


def require_each_group_once(groups, run_dir):
    """More groups were begun than a rollout needs: each was trained once, or waits in the last checkpoint."""
    last = run_dir / f"checkpoints/rollout_{ROLLOUTS - 1:06}/rollout/data_source.json"
    state = json.loads(last.read_bytes())
    waiting = [sample["group_index"] for group in state["buffer"] for sample in group[:1]]
    assert sorted([*groups, *waiting]) == list(range(state["next_group"]))


@pytest.mark.parametrize(
    "schedule", ["colocated", "one-step-off", pytest.param("in-flight", marks=pytest.mark.nightly)]
)
def test_a_run_on_another_schedule_trains_every_prompt_once_on_weights_that_arrived(small_run, tmp_path, schedule):
    (tmp_path / "own.py").write_text(REWARD)
    recorded = tmp_path / "recorded.miles"
    options = small_run(
        num_rollout=ROLLOUTS, rollout_batch_size=BATCH, save_interval=2, weight_check_interval=1,
        save_debug_rollout_data=recorded, save_hf=tmp_path / "out",
        custom_rm_path=f"{tmp_path}/own.py:score",
    )  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "miles_api.cli", "train", *options, *FLAGS[schedule]],
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [row["metrics"] for row in rows_of(tmp_path / "run")]
    assert len(rows) == ROLLOUTS
    # Each push was compared with the trainer's weights, tensor by tensor.
    assert all(row["sync/checked_tensors"] > 20 for row in rows)
    assert (tmp_path / "out" / "model.safetensors").is_file()
    rollouts = [one for one in read_dump(str(recorded)) if not one.evaluation]
    groups = [flatten([group.samples])[0].group_index for one in rollouts for group in one.groups]
    if schedule == "in-flight":
        require_each_group_once(groups, tmp_path / "run")
        assert sum(row["rollout/continued_samples"] for row in rows) > 0
        assert all(0 <= row["rollout/staleness"] <= row["rollout/staleness_max"] <= ROLLOUTS for row in rows)
        return
    assert groups == list(range(ROLLOUTS * BATCH))
    if schedule == "colocated":
        assert all(row["memory/trainer_bytes"] > 0 for row in rows)
        assert all(row["train/logprob_gap_max"] < 1e-4 for row in rows)
    else:
        assert [row["rollout/staleness"] for row in rows] == [0.0, 1.0, 1.0, 1.0]
        state = json.loads((tmp_path / "run/checkpoints/rollout_000001/rollout/data_source.json").read_bytes())
        # The third rollout had begun when the second was saved; a run that goes on from there makes it again.
        assert state["next_group"] == 2 * BATCH


KILLING = """
import os, signal
from pathlib import Path

HERE = Path(__file__).parent

def score(args, sample):
    # In the middle of the third rollout, or of the last.
    if (HERE / "run/checkpoints/rollout_000001").exists() and (HERE / "driver").exists():
        driver = int((HERE / "driver").read_text())
        (HERE / "driver").unlink()
        os.kill(driver, signal.SIGKILL)
    return float(sum(sample.tokens) % 3)
"""


@pytest.mark.nightly
def test_a_killed_run_with_cut_responses_and_weights_in_flight_goes_on_and_trains_every_prompt_once(
    small_run, tmp_path
):
    (tmp_path / "own.py").write_text(KILLING)
    recorded = tmp_path / "recorded.miles"
    options = small_run(
        num_rollout=ROLLOUTS, rollout_batch_size=BATCH, save_interval=1, save_debug_rollout_data=recorded,
        custom_rm_path=f"{tmp_path}/own.py:score",
    )  # fmt: skip
    words = [sys.executable, "-m", "miles_api.cli", "train", *options, *FLAGS["in-flight"], "--resume"]
    for expected in (-9, 0):
        with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            if expected:
                (tmp_path / "driver").write_text(str(run.pid))
            said = run.communicate(timeout=250)[0]
        assert run.returncode == expected, said
        if expected:
            done = len(list((tmp_path / "run/checkpoints").glob("rollout_*")))
            assert 0 < done < ROLLOUTS
    assert [row["rollout_id"] for row in rows_of(tmp_path / "run")] == list(range(ROLLOUTS))
    rollouts = [one for one in read_dump(str(recorded)) if not one.evaluation]
    assert [one.rollout_id for one in rollouts] == list(range(ROLLOUTS))
    groups = [flatten([group.samples])[0].group_index for one in rollouts for group in one.groups]
    require_each_group_once(groups, tmp_path / "run")
