"""DAPO's and Dr.GRPO's hooks together in a short whole run, by their short names."""

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.nightly

HOOKS = {"dynamic_filter": "dapo", "reward_post_process": "dapo_overlong", "pg_loss_reducer": "dr_grpo"}


@pytest.fixture(scope="module")
def finished(quickstart_data, tmp_path_factory):
    """Two rollouts of three prompts with eight answers each; the run's directory."""
    folder = tmp_path_factory.mktemp("dapo")
    lines = [json.dumps({"prompt": f"sort {digit}>", "label": digit}) for digit in "0123456789"]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    # Half of the answers to an even digit are right, and none to an odd one.
    (folder / "halves.py").write_text(
        "def half(args, sample):\n    return float(int(sample.label) % 2 == 0 and sample.index % 2 == 0)\n"
    )
    (folder / "run.toml").write_text(f"""
        [run]
        hf_checkpoint = "{quickstart_data / "model"}"
        run_dir = "run"
        num_rollout = 2
        rollout_batch_size = 3
        n_samples_per_prompt = 8
        [data]
        prompt_data = "digits.jsonl"
        label_key = "label"
        [hooks]
        custom_rm_path = "halves.py:half"
        dynamic_sampling_filter_path = "dapo"
        custom_reward_post_process_path = "dapo_overlong"
        custom_pg_loss_reducer_function_path = "dr_grpo"
        [hooks.reward_post_process]
        overlong_cache = 3
        [reward]
        grpo_std_normalization = false
        [rollout]
        rollout_max_response_len = 4
        [local_engine]
        engine_max_total_len = 32
        [objective]
        eps_clip_high = 0.28
    """)
    run = subprocess.run(
        [sys.executable, "-m", "miles_api.cli", "train", str(folder / "run.toml")],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder / "run"


def metrics_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["metrics"] for row in rows if row["kind"] == "rollout"]


def test_they_are_found_by_short_name_and_called(finished):
    loaded = json.loads((finished / "hooks.json").read_text())
    for hook, name in HOOKS.items():
        [row] = [row for row in loaded if row["hook"] == hook and row["process"] != "driver" and row["calls"]]
        assert (row["reference"], row["distribution"]) == (name, "miles-hooks-contrib")


def test_every_trained_group_has_right_and_wrong_answers_and_drops_are_counted_by_reason(finished):
    rows = metrics_of(finished)
    assert [row["rollout/equal_groups"] for row in rows] == [0.0, 0.0]
    assert sum(row.get("rollout/dropped/all_wrong", 0.0) for row in rows) > 0
    assert all(row["train/grad_norm"] > 0 for row in rows)


def test_the_logged_reward_is_accuracy_without_the_punishment(finished):
    assert [row["rollout/reward"] for row in metrics_of(finished)] == [0.5, 0.5]
