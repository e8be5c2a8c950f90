"""On-policy distillation in a whole run: the policy moves towards a teacher that the trainer holds beside it."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
ROLLOUTS = 6
OWN = """
def nothing(args, sample):
    return 0.0

def note(args, model, store_prefix):
    assert store_prefix == "teacher_"
"""


def make_model(folder, characters=""):
    """Write the quickstart's model with other random weights, and so many tokens more."""
    spec = importlib.util.spec_from_file_location("prepare", QUICKSTART / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.make_model(folder, seed=1, characters=prepare.CHARACTERS + characters)
    return folder


def sharpen(folder):
    """Make a random model sure of what it says: beside it the policy is far away."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.norm.weight.data.fill_(4.0)
    model.save_pretrained(folder)
    return folder


def miles(*words):
    return subprocess.run(
        [sys.executable, "-m", "miles_api.cli", *map(str, words)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def test_without_any_reward_the_policy_comes_closer_to_its_teacher(small_run, tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    words = small_run(
        num_rollout=ROLLOUTS, opd_teacher_load=sharpen(make_model(tmp_path / "teacher")), lr=3e-3, eval_interval=1000,
        custom_rm_path=f"{tmp_path}/own.py:nothing",
        custom_megatron_before_log_prob_hook_path=f"{tmp_path}/own.py:note",
    )  # fmt: skip
    run = miles("train", *words, "--use-opd")
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    rows = [line for line in lines if line["kind"] == "rollout"]
    gaps = [row["metrics"]["train/opd_kl"] for row in rows]
    assert len(gaps) == ROLLOUTS
    assert gaps[0] > 0.5
    assert gaps[-1] < 0.8 * gaps[0]
    hooks = json.loads((tmp_path / "run" / "hooks.json").read_text())
    assert [h["calls"] for h in hooks if h["hook"] == "before_log_prob" and h["process"] == "trainer 0"] == [ROLLOUTS]


def test_a_teacher_of_other_tokens_is_refused_before_anything_starts(small_run, tmp_path):
    teacher = make_model(tmp_path / "teacher", characters="|")
    run = miles("check", *small_run(opd_teacher_load=teacher), "--use-opd")
    assert run.returncode == 2
    assert f"--opd-teacher-load {teacher} has a vocabulary of 20 tokens and --hf-checkpoint" in run.stdout + run.stderr
