"""examples/custom_rollout: both forms of a rollout of one's own, by themselves and in a short whole run."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api import RolloutFnConstructorInput, RolloutFnTrainInput
from miles_api.record import read_dump
from miles_api.testing import MemorySource, check_hook, hook_args
from miles_api.testing.samples import Maker
from tests.examples_of import load

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "custom_rollout"
function, curriculum = load(EXAMPLE / "function.py"), load(EXAMPLE / "curriculum.py")
UNSOLVED, MIXED, SOLVED = [0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]


def scores(groups):
    return [[sample.reward for sample in group] for group in groups]


class Scorer:
    """Stands for generation: the groups that are asked get the rewards of `plan`, one after another."""

    def __init__(self, *plan):
        self._plan = iter(plan)
        self._of = {}

    async def group(self, args, group):
        for sample, reward in zip(group, next(self._plan), strict=True):
            sample.append_response_tokens([3, 4], log_probs=[-0.5, -0.5], text="ab")
            sample.reward = reward
        return group

    async def sample(self, args, sample):
        if sample.group_index not in self._of:
            self._of[sample.group_index] = iter(next(self._plan))
        sample.reward = next(self._of[sample.group_index])


@pytest.fixture
def source():
    return MemorySource(Maker(), 3)


def test_the_function_draws_until_every_group_teaches_something(monkeypatch, source):
    monkeypatch.setattr(function, "answer", Scorer(SOLVED, MIXED, UNSOLVED, MIXED, MIXED).sample)
    groups = asyncio.run(function.rollout(hook_args(rollout_batch_size=3), 0, source))
    assert scores(groups) == [MIXED] * 3


def test_the_function_ends_with_a_full_rollout_where_nothing_is_left_to_learn(monkeypatch, source):
    monkeypatch.setattr(function, "answer", Scorer(MIXED, *[SOLVED] * 8).sample)
    groups = asyncio.run(function.rollout(hook_args(rollout_batch_size=3), 0, source))
    assert scores(groups) == [MIXED, SOLVED, SOLVED]


def make_curriculum(source, size):
    return curriculum.Curriculum(RolloutFnConstructorInput(args=hook_args(rollout_batch_size=size), data_source=source))


def collect(rollout, rollout_id):
    return asyncio.run(rollout(RolloutFnTrainInput(rollout_id=rollout_id)))


def test_a_prompt_that_nobody_solved_is_asked_again_when_its_time_has_come(monkeypatch, source):
    rollout = make_curriculum(source, 2)
    monkeypatch.setattr(curriculum, "generate_group", Scorer(UNSOLVED, MIXED, MIXED, *[MIXED] * 6).group)
    first = collect(rollout, 0)
    assert scores(first.samples) == [MIXED, MIXED]
    assert first.metrics == {"rollout/solved_by_all": 0.0, "rollout/postponed": 1.0}
    [(_, [waiting, *_])] = rollout.later
    assert (waiting.reward, waiting.response, waiting.response_length) == (None, "", 0)
    early = collect(rollout, curriculum.WAIT - 1)
    assert waiting.group_index not in {group[0].group_index for group in early.samples}
    due = collect(rollout, curriculum.WAIT)
    assert waiting.group_index in {group[0].group_index for group in due.samples}
    assert due.metrics["rollout/postponed"] == 0.0


def test_a_rollout_is_full_even_where_nobody_solves_anything_and_no_prompt_is_lost(monkeypatch, source):
    rollout = make_curriculum(source, 2)
    monkeypatch.setattr(curriculum, "generate_group", Scorer(*[UNSOLVED] * 8).group)
    output = collect(rollout, 0)
    assert scores(output.samples) == [UNSOLVED, UNSOLVED]
    trained = {group[0].group_index for group in output.samples}
    waiting = {group[0].group_index for _, group in rollout.later}
    assert (len(trained), len(waiting), trained & waiting) == (2, 6, set())


def test_prompts_that_wait_are_part_of_a_checkpoint(monkeypatch, source):
    rollout, again = make_curriculum(source, 2), make_curriculum(source, 2)
    monkeypatch.setattr(curriculum, "generate_group", Scorer(UNSOLVED, MIXED, MIXED).group)
    collect(rollout, 0)
    again.load_state_dict(json.loads(json.dumps(rollout.state_dict())))
    assert again.later == rollout.later


@pytest.mark.parametrize("form", [function.rollout, curriculum.Curriculum])
def test_both_do_what_their_signature_says(form, quickstart_data):
    reward = f"{ROOT}/examples/quickstart/reward.py:sorted_digits"
    check_hook("rollout", form, hf_checkpoint=str(quickstart_data / "model"), custom_rm_path=reward)


# Short whole runs


FORMS = {"function": "function.py:rollout", "class": "curriculum.py:Curriculum"}


@pytest.fixture(scope="module", params=FORMS)
def finished(request, quickstart_data, tmp_path_factory):
    """Two rollouts of four prompts with four answers each; what the run left and what it recorded."""
    folder = tmp_path_factory.mktemp(request.param)
    # One digit in, one out: a model that was never trained gets some of that right.
    lines = [json.dumps({"prompt": f"sort {digit}>", "label": digit}) for digit in "0123456789"]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    words = [
        ROOT / "examples" / "quickstart" / "run.toml", "--rollout-function-path", EXAMPLE / FORMS[request.param],
        "--hf-checkpoint", quickstart_data / "model", "--prompt-data", folder / "digits.jsonl",
        "--eval-prompt-data", folder / "digits.jsonl", "--run-dir", folder / "run", "--num-rollout", 2,
        "--rollout-batch-size", 4, "--n-samples-per-prompt", 4, "--eval-interval", 2, "--rollout-max-response-len", 1,
        "--save-debug-rollout-data", folder / "rollouts.mdump",
    ]  # fmt: skip
    run = subprocess.run(
        [sys.executable, "-m", "miles_api.cli", "train", *map(str, words)],
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows, list(read_dump(folder / "rollouts.mdump")), run.stderr


def test_its_rollouts_are_trained_checked_recorded_and_evaluated_like_any_other(finished):
    rows, records, _ = finished
    rollouts = [record for record in records if not record.evaluation]
    assert [len(record.groups) for record in rollouts] == [4, 4]
    samples = [sample for record in rollouts for group in record.groups for sample in group.samples]
    assert len({sample.index for sample in samples}) == 2 * 4 * 4
    assert [sample.weight_versions for sample in samples] == [["0"]] * 16 + [["1"]] * 16
    trained = [row["metrics"] for row in rows if row["kind"] == "rollout"]
    assert max(metrics.get("train/logprob_gap_max", 0.0) for metrics in trained) < 1e-4
    assert [row["rollout_id"] for row in rows if row["kind"] == "eval"] == [-1, 1]
    assert sum(record.evaluation for record in records) == 2


def test_nothing_that_it_leaves_open_is_complained_about(finished):
    assert "Unclosed" not in finished[2]
    assert "never awaited" not in finished[2]
