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


@pytest.mark.parametrize("schedule", FLAGS)
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
        # More groups were begun than a rollout needs: what was left over went on, or waits in the buffer.
        state = json.loads((tmp_path / "run/checkpoints/rollout_000003/rollout/data_source.json").read_bytes())
        waiting = [sample["group_index"] for group in state["buffer"] for sample in group[:1]]
        assert sorted([*groups, *waiting]) == list(range(state["next_group"]))
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
