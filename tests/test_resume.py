"""A run that is killed and started again with the same command is the run that was never killed."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api.record import read_dump

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart" / "run.toml"
ROLLOUTS, SEED = 6, int(os.environ.get("MILES_RESUME_SEED", "0"))
TIMEOUT = 280

OWN = '''
"""Hooks that draw from every process's generators, and end the whole run's driver at the call they are told to."""
import itertools, json, os, random, signal
from pathlib import Path
from miles_api import DynamicFilterOutput
from miles_rollout.data_source import RolloutDataSourceWithBuffer

HERE = Path(__file__).parent
# Hooks run in several threads: each call has a number of its own.
CALLS = {moment: itertools.count(1) for moment in ("reward", "filter", "train", "save", "saved")}

def reached(moment):
    call = next(CALLS[moment])
    order = HERE / "kill.json"
    if order.exists():
        wanted = json.loads(order.read_text())
        if wanted["moment"] == moment and call == wanted["call"]:
            order.rename(HERE / "killed.json")
            os.kill(wanted["pid"], signal.SIGKILL)

def score(args, sample):
    reached("reward")
    return float(sum(map(ord, sample.response)) % 3)

def keep(args, samples):
    reached("filter")
    varied = len({sample.reward for sample in samples}) > 1
    return DynamicFilterOutput(keep=varied and random.random() < 0.8, reason="unlucky" if varied else "equal")

def step(args, rollout_id, step_id, model, optimizer, opt_param_scheduler):
    reached("train")

class Source(RolloutDataSourceWithBuffer):
    def save(self, rollout_id):
        super().save(rollout_id)
        reached("save")

def registered(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    reached("saved")
'''


@pytest.fixture(scope="module")
def start(quickstart_data, tmp_path_factory):
    """Start the command in a directory of its own; return its exit code and what it printed."""

    def run(folder, kill=None):
        (folder / "own.py").write_text(OWN)
        own = f"{folder}/own.py"
        options = {
            "hf-checkpoint": quickstart_data / "model", "prompt-data": quickstart_data / "train.jsonl",
            "eval-prompt-data": quickstart_data / "heldout.jsonl", "eval-interval": 3, "num-rollout": ROLLOUTS,
            "rollout-batch-size": 4, "n-samples-per-prompt": 4, "over-sampling-batch-size": 7, "save-interval": 2,
            # A critic and a reference: both must be what they were.
            "advantage-estimator": "ppo", "critic-lr": "1e-2", "kl-coef": "0.1",
            "save-total-limit": 2, "lr": "1e-2", "lr-decay-style": "cosine", "run-dir": folder / "run",
            "save-debug-rollout-data": folder / "rollouts.mdump",
            "custom-rm-path": f"{own}:score", "dynamic-sampling-filter-path": f"{own}:keep",
            "custom-megatron-before-train-step-hook-path": f"{own}:step", "data-source-path": f"{own}:Source",
            "custom-megatron-post-save-hook-path": f"{own}:registered",
        }  # fmt: skip
        words = [str(word) for flag, value in options.items() for word in (f"--{flag}", value)]
        with subprocess.Popen(
            [sys.executable, "-m", "miles_api.cli", "train", QUICKSTART, *words, "--deterministic", "--resume"],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        ) as process:  # fmt: skip
            if kill:
                (folder / "kill.json").write_text(json.dumps({**kill, "pid": process.pid}))
            printed = process.communicate(timeout=TIMEOUT)[0]
        assert kill is None or (folder / "killed.json").exists(), printed
        return process.returncode, printed

    return run


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """One run that is left alone, and one that is killed at two moments drawn from a seed, the second in a save."""
    alone, killed = (tmp_path_factory.mktemp(name) for name in ("alone", "killed"))
    code, printed = start(alone)
    assert code == 0, printed
    draw = random.Random(SEED)
    # The first evaluation alone scores 128 samples, each rollout at least 28, in two training steps.
    calls = {"reward": draw.randint(100, 300), "filter": draw.randint(1, 30), "train": draw.randint(1, 8)}
    first, second = draw.choice(list(calls)), draw.choice(["save", "saved"])
    told = []
    for kill in ({"moment": first, "call": calls[first]}, {"moment": second, "call": 1}):
        code, printed = start(killed, kill)
        told.append((kill, printed))
        assert code == -9, printed
        (killed / "killed.json").unlink()
    code, printed = start(killed)
    assert code == 0, printed
    return alone, killed, [*told, ({}, printed)]


def rows(folder, name="metrics.jsonl"):
    """Return the rows of rollouts and evaluations without what is time."""
    lines = [json.loads(line) for line in (folder / "run" / name).read_text().splitlines()]
    for line in lines:
        line.pop("time", None), line.pop("seconds", None)
        for metric in [m for m in line.get("metrics", {}) if m.endswith("/seconds")]:
            line["metrics"].pop(metric)
    return [line for line in lines if line["kind"] != "run"]


def test_a_killed_and_resumed_run_has_bitwise_the_metrics_of_one_that_was_left_alone(runs):
    alone, killed, told = runs
    ours, theirs = rows(alone), rows(killed)
    assert [(row["kind"], row["rollout_id"]) for row in theirs] == [(row["kind"], row["rollout_id"]) for row in ours]
    for one, other in zip(ours, theirs, strict=True):
        assert other == one, told
    for name in ("train/loss", "train/value_loss", "train/kl_reward"):
        assert len({row["metrics"][name] for row in ours if row["kind"] == "rollout"}) == ROLLOUTS


def test_the_run_that_was_compared_has_dropped_groups_and_handed_out_others_again(runs):
    alone, _, _ = runs
    assert any(row["metrics"].get("rollout/dropped/unlucky") for row in rows(alone))
    starts = [row["metrics"]["hooks/reward/calls"] for row in rows(alone) if row["kind"] == "rollout"]
    assert max(starts) > 16


def test_every_rollout_is_recorded_once_whatever_was_made_twice(runs):
    alone, killed, _ = runs
    for folder in (alone, killed):
        records = [record for record in read_dump(folder / "rollouts.mdump") if not record.evaluation]
        assert [record.rollout_id for record in records] == list(range(ROLLOUTS))
    assert [[group.samples for group in record.groups] for record in read_dump(alone / "rollouts.mdump")] == [
        [group.samples for group in record.groups] for record in read_dump(killed / "rollouts.mdump")
    ]


def test_only_the_newest_checkpoints_are_left_and_nothing_of_the_killed_ones(runs):
    for folder in runs[:2]:
        left = sorted(path.name for path in (folder / "run" / "checkpoints").iterdir())
        assert left == ["latest.json", "rollout_000003", "rollout_000005"]


def test_its_samples_are_the_same_too(runs):
    alone, killed, _ = runs
    assert rows(killed, "samples.jsonl") == rows(alone, "samples.jsonl")
