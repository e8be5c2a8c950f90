"""One small run of the whole stack, and what it leaves behind."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from miles_api.checks.check import derive
from miles_api.errors import ServiceError
from miles_api.loading.load import provider
from miles_api.parsing.parse import parse_run
from miles_api.services import Placement

TIMEOUT = 280


def miles(*words):
    return subprocess.run(
        [sys.executable, "-m", "miles_api.cli", *map(str, words)],
        capture_output=True, text=True, timeout=TIMEOUT, check=False,
    )  # fmt: skip


POST_SAVE = """
from pathlib import Path

def register(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    parts = sorted(path.name for path in Path(checkpoint_dir).iterdir())
    Path(args.run_dir, "registered").write_text(f"{rollout_id} {checkpoint_dir} {hf_checkpoint_dir} {parts}")
"""


@pytest.fixture(scope="module")
def finished(quickstart_data, tmp_path_factory):
    """A run of three rollouts that recomputes nothing away, and its directory."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    (folder.parent / "own.py").write_text(POST_SAVE)
    toml = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
    run = miles(
        "train", toml, "--hf-checkpoint", quickstart_data / "model", "--run-dir", folder, "--num-rollout", 3,
        "--prompt-data", quickstart_data / "train.jsonl", "--eval-prompt-data", quickstart_data / "heldout.jsonl",
        "--eval-interval", 2, "--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--no-skip-zero-advantage",
        "--no-use-rollout-logprobs", "--save-hf", folder / "final",
        "--custom-megatron-post-save-hook-path", f"{folder.parent}/own.py:register",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return folder, run


def rows(folder, kind):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def test_trainer_and_engine_agree_on_every_token_of_every_rollout(finished):
    gaps = [row["metrics"]["train/logprob_gap_max"] for row in rows(finished[0], "rollout")]
    assert len(gaps) == 3
    assert max(gaps) < 1e-4


def test_the_run_ends_by_saying_where_the_report_lies(finished):
    folder, run = finished
    assert run.stdout.rstrip().endswith(f"report: {folder / 'report.html'}")
    assert "sorted_digits" in (folder / "report.html").read_text()


def test_every_phase_of_a_rollout_is_accounted_for(finished):
    for row in rows(finished[0], "rollout"):
        parts = {phase: value for phase, value in row["seconds"].items() if phase != "total"}
        assert sum(parts.values()) == pytest.approx(row["seconds"]["total"], rel=1e-6)
        assert set(parts) >= {"generate", "train", "weight_sync", "other"}


def test_held_out_prompts_are_evaluated_before_during_and_after(finished):
    assert [row["rollout_id"] for row in rows(finished[0], "eval")] == [-1, 1, 2]


def test_the_resolved_config_says_where_values_came_from_and_runs_again(finished):
    text = (finished[0] / "config.toml").read_text()
    assert "num_rollout = 3  # command line" in text
    assert "# global_batch_size = 8 follows from the others" in text
    assert "eps_clip_high = 0.28  # run.toml" in text
    assert tomllib.loads(text)["run"]["rollout_batch_size"] == 4


def test_the_hooks_that_ran_are_listed_with_file_hash_and_calls(finished):
    hooks = json.loads((finished[0] / "hooks.json").read_text())
    checked, reward = [hook for hook in hooks if hook["hook"] == "reward"]
    assert (checked["process"], reward["process"]) == ("driver", "rollout")
    assert reward["file"].endswith("examples/quickstart/reward.py")
    assert len(reward["sha256"]) == 64
    assert checked["sha256"] == reward["sha256"]
    assert reward["calls"] == 3 * 16 + 3 * 128


def test_the_post_save_hook_gets_the_checkpoint_in_its_place(finished):
    folder, _ = finished
    written = folder / "checkpoints" / "rollout_000002"
    parts = ["hf", "rollout", "state.json", "trainer"]
    assert (folder / "registered").read_text() == f"2 {written} {written}/hf {parts}"
    hooks = json.loads((folder / "hooks.json").read_text())
    assert [h["calls"] for h in hooks if h["hook"] == "post_save" and h["process"] == "trainer 0"] == [1]


def test_the_run_says_once_that_every_hook_was_called(finished):
    assert finished[1].stderr.count("every configured hook was called: reward\n") == 1


def test_the_last_checkpoint_continues_where_the_run_ended(finished, quickstart_data, tmp_path):
    folder, _ = finished
    again = miles(
        "train", folder / "config.toml", "--load", folder / "checkpoints", "--run-dir", tmp_path / "more",
        "--num-rollout", 4, "--save-hf", tmp_path / "hf",
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    (row,) = rows(tmp_path / "more", "rollout")
    assert row["rollout_id"] == 3
    assert row["metrics"]["train/logprob_gap_max"] < 1e-4
    first = json.loads((tmp_path / "more" / "samples.jsonl").read_text().splitlines()[1])["samples"][0]
    assert first["group_index"] == 12
    assert json.loads((folder / "checkpoints" / "latest.json").read_text()) == {"directory": "rollout_000002"}
    assert (tmp_path / "more" / "checkpoints" / "rollout_000003").is_dir()


def test_the_exported_weights_are_what_transformers_loads(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(finished[0] / "final")
    assert sum(p.numel() for p in model.parameters()) > 0
    assert AutoTokenizer.from_pretrained(finished[0] / "final").eos_token_id == 1


def test_no_generation_reaches_an_engine_except_through_the_router(small_run):
    config = derive(parse_run(small_run(generate_timeout=5)))
    fleet, router = (provider("miles.services", name)(config) for name in ("engines", "router"))
    worker = provider("miles.services", "rollout")(config)
    try:
        url = router.start()
        fleet.start([Placement()])
        router.register(fleet.endpoints()[0])
        worker.start(url)
        assert len(worker.generate(0, "default")["batch"]["tokens"]) == 16
        router.stop()
        with pytest.raises(ServiceError):
            worker.generate(1, "default")
    finally:
        worker.stop()
        router.stop()
        fleet.stop()


def test_a_reward_that_raises_stops_the_run_with_the_users_traceback(small_run, tmp_path):
    (tmp_path / "bad.py").write_text("def score(args, sample):\n    return sample.no_such_thing\n")
    run = miles("train", *small_run(custom_rm_path=f"{tmp_path}/bad.py:score"))
    assert run.returncode == 1
    assert "bad.py" in run.stderr
    assert "no_such_thing" in run.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "no_such_thing" in summary["error"]


def test_rollouts_are_recorded_without_a_trainer_and_trained_without_an_engine(small_run, tmp_path):
    dump = tmp_path / "dump.miles"
    words = small_run(run_dir=tmp_path / "recorded", save_debug_rollout_data=dump)
    recording = miles("train", *words, "--debug-rollout-only")
    assert recording.returncode == 0, recording.stdout + recording.stderr
    assert not (tmp_path / "recorded" / "checkpoints").exists()
    assert "starting trainer" not in recording.stderr
    training = miles("train", *small_run(load_debug_rollout_data=dump))
    assert training.returncode == 0, training.stdout + training.stderr
    assert "starting engines" not in training.stderr
    pairs = zip(rows(tmp_path / "recorded", "rollout"), rows(tmp_path / "run", "rollout"), strict=True)
    for made, read in pairs:
        assert made["metrics"]["rollout/reward"] == read["metrics"]["rollout/reward"]
        assert "train/loss" in read["metrics"]
        assert "train/loss" not in made["metrics"]
    assert rows(tmp_path / "run", "eval") == []


def test_a_process_that_loads_other_code_than_was_checked_stops_the_run_before_the_first_rollout(small_run, tmp_path):
    (tmp_path / "own.py").write_text(
        "from pathlib import Path\n"
        "Path(__file__).open('a').write('# imported again\\n')\n"
        "def score(args, sample):\n    return 1.0\n"
    )
    run = miles("train", *small_run(custom_rm_path=f"{tmp_path}/own.py:score"))
    assert run.returncode == 1
    assert "the reward hook" in run.stderr
    assert "is not the same everywhere: file hash" in run.stderr
    assert rows(tmp_path / "run", "rollout") == []
