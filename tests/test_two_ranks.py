"""Two trainer ranks do what one does, and two engines serve what they train: whole runs through `miles train`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api.options import flag_of

QUICKSTART = Path(__file__).parent.parent / "examples" / "quickstart"
ROLLOUTS = 3
LAYOUTS = {
    "data": {"actor_num_gpus_per_node": 2},
    "tensor": {"actor_num_gpus_per_node": 2, "tensor_model_parallel_size": 2},
}

# A local engine names its answers `<a name of its own>-<number>`: the middleware notes who answered.
HOOKS = """
import json
from pathlib import Path


def score(args, sample):
    return float(sum(sample.tokens) % 3)


class NoteEngine:
    def __init__(self, app, *, router):
        self._app = app

    async def __call__(self, scope, receive, send):
        async def noting(message):
            if scope["path"] == "/generate" and message.get("body"):
                answer = json.loads(message["body"])
                with Path(__file__).with_name("answered").open("a") as file:
                    print(answer["meta_info"]["id"].rpartition("-")[0], file=file)
            await send(message)

        await self._app(scope, receive, noting)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The quickstart's model with one token more: 20 can be divided over two ranks."""
    folder = tmp_path_factory.mktemp("model")
    spec = importlib.util.spec_from_file_location("prepare", QUICKSTART / "prepare.py")
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    prepare.make_model(folder, seed=0, characters=prepare.CHARACTERS + "|")
    return folder


@pytest.fixture(scope="module")
def train(model, quickstart_data, tmp_path_factory):
    """Return a function that runs `miles train` with these options and returns the run's rows of metrics."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "own.py").write_text(HOOKS)

    def run(name, **options):
        values = {
            "hf_checkpoint": model, "prompt_data": quickstart_data / "train.jsonl", "run_dir": folder / name,
            "num_rollout": ROLLOUTS, "rollout_batch_size": 4, "n_samples_per_prompt": 4, "eval_interval": 1000,
            "eval_prompt_data": quickstart_data / "heldout.jsonl", "custom_rm_path": f"{folder}/own.py:score",
            **options,
        }  # fmt: skip
        flags = [word for key, value in values.items() for word in (flag_of(key), str(value))]
        done = subprocess.run(
            [sys.executable, "-m", "miles_api.cli", "train", str(QUICKSTART / "run.toml"), *flags],
            capture_output=True, text=True, timeout=250, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        return [line["metrics"] for line in lines if line["kind"] == "rollout"]

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def one_rank(train):
    """A run of one rank that records its rollouts."""
    return train("one", save_debug_rollout_data=train.folder / "recorded.miles")


@pytest.fixture(scope="module")
def live(train):
    """A run of two data-parallel ranks and two engines that checks every push."""
    hooks = {"miles_router_middleware_paths": f"{train.folder}/own.py:NoteEngine"}
    return train("live", **LAYOUTS["data"], rollout_num_engines=2, weight_check_interval=1, **hooks)


def test_a_run_checks_its_first_weights_without_being_told_to(one_rank):
    assert ["sync/checked" in row for row in one_rank] == [True, False, False]
    assert one_rank[0]["sync/checked"] == 1
    assert one_rank[0]["sync/checked_tensors"] > 20
    assert one_rank[0]["sync/probe_gap_max"] < 1e-4


@pytest.mark.parametrize("layout", ["data", pytest.param("tensor", marks=pytest.mark.nightly)])
def test_two_ranks_learn_from_recorded_rollouts_what_one_rank_learned(train, one_rank, layout):
    rows = train(layout, **LAYOUTS[layout], load_debug_rollout_data=train.folder / "recorded.miles")
    assert len(rows) == len(one_rank) == ROLLOUTS
    for row, expected in zip(rows, one_rank, strict=True):
        assert expected["train/grad_norm"] > 1e-2
        for name in ("train/loss", "train/grad_norm"):
            assert row[name] == pytest.approx(expected[name], rel=2e-6, abs=1e-4)


def test_two_engines_serve_exactly_what_two_ranks_train(live):
    assert len(live) == ROLLOUTS
    for row in live:
        assert row["train/logprob_gap_max"] < 1e-4
        assert row["sync/checked"] == 2
        assert row["sync/checked_tensors"] > 20
        assert row["sync/probe_gap_max"] < 1e-4


def test_both_engines_answer(train, live):
    answered = (train.folder / "answered").read_text().splitlines()
    counts = sorted(answered.count(name) for name in set(answered))
    assert len(counts) == 2
    assert sum(counts) >= ROLLOUTS * 16
    assert counts[0] > ROLLOUTS
