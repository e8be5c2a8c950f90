"""examples/multi_agent: what a team of agents makes of a prompt, who is compared with whom, and a short whole run."""

import asyncio
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api import GenerateFnInput, Sample
from miles_api.record import read_dump
from miles_api.testing import State, check_hook, hook_args, make_sample
from miles_api.testing.tokenizer import ByteTokenizer
from tests.examples_of import load

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "multi_agent"
agents = load(EXAMPLE / "agents.py")
TEAM = {"solver": 2, "rewriter": 3, "selector": 1}


class Scripted:
    """An engine that answers each prompt as `answers` says, several answers to one prompt in turn."""

    def __init__(self, answers):
        self._tokenizer = ByteTokenizer()
        self._answers = {prompt: iter(texts) for prompt, texts in answers.items()}
        self.seeds = []

    def answer(self, path, payload):
        self.seeds.append(payload["sampling_params"]["sampling_seed"])
        text = next(self._answers[self._tokenizer.decode(payload["input_ids"])])
        ids = self._tokenizer.encode(text)
        meta = {"finish_reason": {"type": "stop"}, "output_token_logprobs": [[-0.5, token, None] for token in ids]}
        return {"text": text, "output_ids": ids, "meta_info": meta}


def work(answers, *, evaluation=False, **options):
    """Let a team of two solvers and three rewriters work on `312`."""
    args = hook_args(agents.generate, reward_key="weighted", solvers=2, rewriters=3, **options)
    engine = Scripted(answers)
    state, sample = State(args, engine), Sample(prompt="312", label="123", index=5, group_index=2, rollout_id=5)
    request = GenerateFnInput(
        state=state, sample=sample, sampling_params=dict(state.sampling_params), evaluation=evaluation, args=args
    )
    return asyncio.run(agents.generate(request)).samples, engine


ANSWERS = {
    "sort 312>": ["132", "123"],
    "fix 312 132 123>": ["123", "213", "123"],
    "pick 312 123 213 123>": ["123"],
}


def test_each_agent_sees_what_those_before_it_wrote():
    team, _ = work(ANSWERS)
    assert [sample.prompt for sample in team] == ["sort 312>"] * 2 + ["fix 312 132 123>"] * 3 + [
        "pick 312 123 213 123>"
    ]
    assert Counter(sample.metadata["role"] for sample in team) == TEAM


def test_a_members_sample_has_a_number_a_trajectory_and_a_seed_of_its_own_and_the_group_of_the_prompt():
    team, engine = work(ANSWERS)
    assert [sample.index for sample in team] == list(range(30, 36))
    assert [sample.rollout_id for sample in team] == [sample.index for sample in team]
    assert {sample.group_index for sample in team} == {2}
    assert len(set(engine.seeds)) == 6


def test_an_agents_sample_is_its_own_conversation_and_nothing_else():
    team, _ = work(ANSWERS)
    for sample in team:
        assert sample.response_length == len(sample.response) == len(sample.rollout_log_probs) == sum(sample.loss_mask)
        assert len(sample.tokens) == len(sample.prompt) + sample.response_length


def test_a_right_choice_makes_right_answers_worth_more_and_a_wrong_one_less():
    team, _ = work(ANSWERS)
    assert [sample.reward["right"] for sample in team] == [0, 1, 1, 0, 1, 1]
    assert [sample.reward["weighted"] for sample in team] == [0, 1.2, 1.2, 0, 1.2, 1.2]
    team, _ = work({**ANSWERS, "pick 312 123 213 123>": ["213"]})
    assert [sample.reward["weighted"] for sample in team] == [0, 0.8, 0.8, 0, 0.8, 0]


def test_a_right_answer_that_no_rewriter_gave_is_no_choice():
    team, _ = work({**ANSWERS, "fix 312 132 123>": ["213", "213", "321"], "pick 312 213 213 321>": ["123"]})
    assert team[-1].reward["right"] == 0.0


@pytest.mark.parametrize(
    ("rewritten", "learns"), [("123 123 123", True), ("123 213 213", True), ("213 213 213", False)]
)
def test_a_selector_that_had_nothing_to_win_is_not_trained(rewritten, learns):
    prompt = f"pick 312 {rewritten}>"
    team, _ = work({**ANSWERS, "fix 312 132 123>": rewritten.split(), prompt: ["123"]})
    assert [sample.remove_sample for sample in team] == [False] * 5 + [not learns]


def test_evaluation_reports_the_teams_answer_and_what_its_members_alone_would_have_got():
    selector, _ = work(ANSWERS, evaluation=True)
    assert selector.reward["right"] == 1.0
    metrics = {}
    data = {"held": {"samples": [selector], "rewards": [1.0], "truncated": [False]}}
    assert agents.log_evaluation(0, hook_args(), data, metrics) is False
    assert metrics == {"eval/held/solver": 0.5, "eval/held/rewriter": pytest.approx(2 / 3)}


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(agents.ROLES), st.floats(-2, 2)), min_size=1))
def test_each_role_of_a_prompt_is_centred_among_its_peers_whatever_the_others_earn(drawn):
    samples = [
        make_sample(group_index=group, index=i, rollout_id=i, reward=reward, metadata={"role": role})
        for i, (group, role, reward) in enumerate(drawn)
    ]
    raw, rewards = agents.normalize_by_role(hook_args(), samples)
    assert raw == [reward for _, _, reward in drawn]
    for own in columns(samples, rewards).values():
        assert sum(own) == pytest.approx(0, abs=1e-6)


def columns(samples, rewards):
    """Return the rewards by prompt and role, without removed samples."""
    found = defaultdict(list)
    for sample, reward in zip(samples, rewards, strict=True):
        if not sample.remove_sample:
            found[sample.group_index, sample.metadata["role"]].append(reward)
    return found


def test_the_default_normalisation_would_have_set_roles_against_each_other():
    from miles_rollout.normalize import normalize_rewards

    samples = [
        make_sample(group_index=0, index=i, rollout_id=i, reward=reward, metadata={"role": role})
        for i, (role, reward) in enumerate([("solver", 1.0), ("solver", 1.0), ("rewriter", 0.0), ("rewriter", 0.0)])
    ]
    assert agents.normalize_by_role(hook_args(), samples)[1] == [0.0] * 4
    assert normalize_rewards(hook_args(), samples)[1][0] > 0


@pytest.mark.parametrize(
    ("hook", "function"), [("generate", agents.generate), ("reward_post_process", agents.normalize_by_role)]
)
def test_its_hooks_do_what_their_signatures_say(hook, function):
    check_hook(hook, function, reward_key="weighted")


# A whole run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two rollouts of four prompts, four teams each: its directory and the recorded rollouts and training batches."""
    folder = tmp_path_factory.mktemp("multi_agent")
    make = [sys.executable, str(EXAMPLE / "prepare.py"), "--out", str(folder), "--no-warm-up"]
    subprocess.run(make, check=True, timeout=120)
    # One digit in, one out: a model that was never trained gets some of that right.
    lines = [json.dumps({"prompt": digit, "label": digit}) for digit in "0123456789"]
    (folder / "digits.jsonl").write_text("\n".join(lines))
    flags = {
        "hf-checkpoint": folder / "model", "prompt-data": folder / "digits.jsonl",
        "eval-prompt-data": folder / "digits.jsonl", "run-dir": folder / "run", "num-rollout": 2,
        "rollout-batch-size": 4, "n-samples-per-prompt": 4, "rollout-max-response-len": 1, "eval-interval": 2,
        "save-debug-rollout-data": folder / "rollouts.mdump", "save-debug-train-data": folder / "train.mdump",
    }  # fmt: skip
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "miles_api.cli", "train", str(EXAMPLE / "run.toml"), *words]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    rollouts = [record for record in read_dump(folder / "rollouts.mdump") if not record.evaluation]
    return folder / "run", rollouts, list(read_dump(folder / "train.mdump"))


def trained(record):
    """Return the samples of a recorded rollout in the order of conversion."""
    samples = [sample for group in record.groups for team in group.samples for sample in team]
    return sorted(samples, key=lambda sample: (sample.group_index, sample.index))


def test_every_agent_of_every_team_is_trained_under_a_number_of_its_own(finished):
    _, rollouts, batches = finished
    seen = []
    for record, batch in zip(rollouts, batches, strict=True):
        samples = trained(record)
        assert Counter(sample.metadata["role"] for sample in samples) == {
            role: 4 * 4 * count for role, count in {"solver": 2, "rewriter": 4, "selector": 1}.items()
        }
        assert batch.columns["sample_indices"] == [sample.index for sample in samples]
        assert batch.columns["rollout_ids"] == batch.columns["sample_indices"]
        assert batch.columns["group_indices"] == [sample.group_index for sample in samples]
        seen += batch.columns["sample_indices"]
    assert len(set(seen)) == len(seen) == 2 * 4 * 4 * 7


def test_in_a_run_each_role_of_a_prompt_is_centred_among_its_peers(finished):
    _, rollouts, batches = finished
    for record, batch in zip(rollouts, batches, strict=True):
        for own in columns(trained(record), record.rewards).values():
            assert sum(own) == pytest.approx(0, abs=1e-4)
        assert [float(reward) for reward in batch.columns["rewards"]] == pytest.approx(record.rewards)
    assert any(reward for record in rollouts for reward in record.rewards)


def test_only_answers_are_trained_and_selectors_that_had_nothing_to_win_not_at_all(finished):
    _, rollouts, batches = finished
    for record, batch in zip(rollouts, batches, strict=True):
        for sample, mask in zip(trained(record), batch.columns["loss_masks"], strict=True):
            assert list(mask) == [int(not sample.remove_sample)] * sample.response_length
    assert any(sample.remove_sample for record in rollouts for sample in trained(record))


def test_each_role_has_a_curve_of_its_own_in_training_and_on_held_out_prompts(finished):
    folder, rollouts, _ = finished
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = [row["metrics"] for row in rows if row["kind"] == "rollout"]
    for record, metrics in zip(rollouts, logged, strict=True):
        for role in agents.ROLES:
            own = [sample.reward["right"] for sample in trained(record) if sample.metadata["role"] == role]
            assert metrics[f"agents/{role}"] == pytest.approx(sum(own) / len(own))
    [before, after] = [row["metrics"] for row in rows if row["kind"] == "eval"]
    assert {"eval/digits/reward", "eval/digits/solver", "eval/digits/rewriter"} <= set(before) & set(after)


def test_trainer_and_engine_agree_on_the_tokens_of_every_agent(finished):
    rows = [json.loads(line) for line in (finished[0] / "metrics.jsonl").read_text().splitlines()]
    gaps = [row["metrics"].get("train/logprob_gap_max") for row in rows if row["kind"] == "rollout"]
    assert max(gap for gap in gaps if gap is not None) < 1e-4
