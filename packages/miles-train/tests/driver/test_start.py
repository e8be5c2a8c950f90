"""Where a run begins, and what it refuses to begin at."""

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api.config import RunConfig
from miles_api.errors import ConfigError, DataError
from miles_api.run_options import RunOptions
from miles_train.driver import check, checkpoint
from miles_train.driver import run_dir as run_dir_module
from miles_train.driver.checkpoint import State
from miles_train.driver.identity import identity_of, options_of, versions
from miles_train.driver.run_dir import RunDir
from miles_train.options import OptimizerOptions, ParallelOptions

MODEL = {"architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "torch_dtype": "float32"}


@pytest.fixture
def files(tmp_path):
    """A model directory without weights, and prompts."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(MODEL))
    (model / "tokenizer.json").write_text("{}")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' * 3)
    return tmp_path


@pytest.fixture
def configure(files):
    def build(*groups, prompts=None, rollout_seed=42, **run):
        run = {
            "hf_checkpoint": str(files / "model"), "run_dir": str(files / "run"), "num_rollout": 10,
            "rollout_batch_size": 2, "n_samples_per_prompt": 2, "num_steps_per_rollout": 1, **run,
        }  # fmt: skip
        config = RunConfig.of(RunOptions(**run), *groups)
        return config.replace(prompt_data=prompts or str(files / "prompts.jsonl"), rollout_seed=rollout_seed)

    return build


def began(config, *rollout_ids):
    """Start a run, log and save these rollouts, and leave it as a kill does."""
    run_dir = RunDir(config, "a run", [])
    for rollout_id in rollout_ids:
        run_dir.log("rollout", rollout_id, {"loss": 1.0}, {})
        run_dir.samples("train", rollout_id, [])
        save(config, run_dir.id, rollout_id)
    run_dir._locks.close()
    return run_dir


def save(config, run_id, rollout_id):
    state = State(
        rollout_id=rollout_id, weight_version=rollout_id + 1, run=run_id, identity=identity_of(config),
        options=options_of(config), versions=versions(),
    )  # fmt: skip
    checkpoint.write(checkpoint.folder_of(config.group(RunOptions)), state, {"trainer": lambda folder: None})


def problems(config):
    wanted = ("--load", "--resume", "--run-dir", "--save", "checkpoint ")
    return [text for text in check.check(config) if text.startswith(wanted)]


def rows(config, name="metrics.jsonl"):
    lines = Path(config.group(RunOptions).run_dir, name).read_text().splitlines()
    return [json.loads(line)["rollout_id"] for line in lines]


def test_a_run_that_never_saved_begins_anew_and_forgets_its_rows(configure):
    config = configure(resume=True)
    first = RunDir(config, "a run", [])
    first.log("rollout", 0, {}, {})
    assert problems(config) == []
    again = RunDir(config, "a run", [])
    assert again.start is None
    assert rows(config) == []
    assert again.id != first.id


def test_a_resumed_run_keeps_its_id_and_the_rows_up_to_its_checkpoint(configure):
    config = configure(resume=True)
    first = began(config, 0, 1)
    first.log("eval", 1, {}, {})
    first.log("rollout", 2, {}, {})
    first.log("run", -1, {}, {})
    first.samples("train", 2, [])
    with Path(first.path, "metrics.jsonl").open("a") as torn:
        torn.write('{"kind": "roll')
    assert problems(config) == []
    again = RunDir(config, "a run", [])
    assert again.start.state.rollout_id == 1
    assert (rows(config), rows(config, "samples.jsonl")) == ([0, 1, 1], [0, 1])
    assert again.id == first.id
    summary = json.loads((first.path / "summary.json").read_text())
    assert summary["notes"] == [f"continued after rollout 1, from {first.path / 'checkpoints' / 'rollout_000001'}"]


def test_damaged_rows_are_taken_out_and_told_and_the_whole_ones_behind_them_stay(configure, capsys):
    config = configure(resume=True)
    first = began(config, 0, 1, 2)
    file = first.path / "metrics.jsonl"
    whole = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(whole[0] + b'{"kind": "rollout", "roll\n' + whole[1] + bytes(80) + b"\n" + whole[2] + b'{"torn')
    RunDir(config, "a run", [])
    assert rows(config) == [0, 1, 2]
    told = "metrics.jsonl: 2 damaged lines were taken out"
    assert told in json.loads((first.path / "summary.json").read_text())["notes"]
    assert capsys.readouterr().err == f"miles train: {first.path}: {told}\n"


def test_a_run_resumes_from_its_own_checkpoint_rather_than_from_the_one_that_it_was_given(configure, files):
    other = configure(run_dir=str(files / "other"))
    began(other, 4)
    config = configure(resume=True, load=str(files / "other" / "checkpoints"))
    assert RunDir(config, "a run", []).start.state.rollout_id == 4
    began(config, 5)
    start = RunDir(config, "a run", []).start
    assert (start.own, start.state.rollout_id) == (True, 5)


def test_a_directory_is_written_by_one_run_at_a_time(configure, files):
    config = configure(resume=True)
    script = (
        "import sys\n"
        "from miles_api.config import RunConfig\n"
        "from miles_api.run_options import RunOptions\n"
        "from miles_train.driver.run_dir import RunDir\n"
        f"held = RunDir(RunConfig.of(RunOptions(run_dir={str(files / 'run')!r})), 'a run', [])\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match="is being written by another run"):
            RunDir(config, "a run", [])
        holder.kill()
        holder.wait()
    assert RunDir(config, "a run", []).start is None


def test_what_resume_cannot_continue_is_refused(configure, files):
    assert problems(configure(resume=True, overwrite=True)) == [
        "--resume continues the run in --run-dir, and --overwrite deletes it: drop one"
    ]
    (files / "run").mkdir()
    (files / "run" / "thesis.txt").write_text("precious")
    assert "there is nothing to --resume" in problems(configure(resume=True))[0]


def test_an_earlier_run_in_the_way_is_one_problem_with_its_checkpoints(configure):
    began(configure(), 3)
    (text,) = problems(configure())
    assert "holds an earlier run: pass --resume to continue it, --overwrite, or another" in text


def test_checkpoints_of_another_run_are_not_resumed(configure, files):
    began(configure(save=str(files / "kept")), 3)
    config = configure(resume=True, run_dir=str(files / "new"), save=str(files / "kept"))
    assert "is not a checkpoint of the run in --run-dir" in problems(config)[0]


def test_a_run_may_save_where_it_loads_and_resume_before_its_first_save(configure, files):
    shared = str(files / "shared")
    began(configure(run_dir=str(files / "first"), save=shared), 3)
    config = configure(resume=True, run_dir=str(files / "second"), save=shared, load=shared)
    for _ in ("first start", "restart"):
        assert problems(config) == []
        start = began(config).start
        assert (start.own, start.state.rollout_id) == (False, 3)
    began(config, 4)
    assert problems(config) == []
    assert began(config).start.own


def test_later_checkpoints_of_the_run_that_is_continued_are_not_replaced(configure, files):
    shared = files / "shared"
    began(configure(run_dir=str(files / "first"), save=str(shared)), 3, 4, 5)
    older = str(shared / "rollout_000003")
    (text,) = problems(configure(save=str(shared), load=older))
    assert "rollout_000004, rollout_000005" in text
    assert "choose another --save" in text
    assert problems(configure(save=str(files / "mine"), load=older)) == []
    assert problems(configure(save=str(shared), load=str(shared))) == []


def test_a_folder_of_checkpoints_is_written_by_one_run_at_a_time(configure, files):
    script = (
        "import sys\n"
        "from miles_api.config import RunConfig\n"
        "from miles_api.run_options import RunOptions\n"
        "from miles_train.driver.run_dir import RunDir\n"
        f"options = RunOptions(run_dir={str(files / 'one')!r}, save={str(files / 'shared')!r})\n"
        "held = RunDir(RunConfig.of(options), 'a run', [])\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(ConfigError, match=f"--save {files / 'shared'} is being written by another run"):
            RunDir(configure(save=str(files / "shared")), "a run", [])
        holder.stdin.close()
    assert RunDir(configure(save=str(files / "shared")), "a run", []).start is None


def test_checkpoints_without_a_pointer_are_not_replaced_either(configure, files):
    began(configure(run_dir=str(files / "first"), save=str(files / "kept")), 3)
    (files / "kept" / checkpoint.LATEST).unlink()
    assert "holds another run's checkpoints" in problems(configure(save=str(files / "kept")))[0]


@pytest.mark.parametrize("option", ["load_debug_rollout_data", "prompt_data", "eval_prompt_data", "custom_rm_path"])
def test_what_the_run_reads_is_not_overwritten(configure, files, option):
    began(configure())
    own = files / "run" / "own.py"
    own.write_text("precious")
    path = f"{own}:score" if option == "custom_rm_path" else str(own)
    config = configure(overwrite=True).replace(**{option: path})
    (text,) = [text for text in check.check(config) if "overwritten" in text]
    assert text.startswith(f"--{option.replace('_', '-')} {path} lies in --run-dir")


def test_a_sink_that_fails_at_the_start_leaves_a_directory_that_can_be_resumed_or_overwritten(configure, monkeypatch):
    def refuse(*_args, **_options):
        raise ConfigError("wandb: not logged in")

    monkeypatch.setattr(run_dir_module, "make_sinks", refuse)
    with pytest.raises(ConfigError, match="not logged in"):
        RunDir(configure(), "a run", [])
    assert problems(configure(resume=True)) == problems(configure(overwrite=True)) == []


def test_damaged_checkpoints_of_the_run_itself_are_told_of_resume(configure):
    run_dir = began(configure(), 3)
    (run_dir.path / "checkpoints" / "rollout_000003" / "state.json").unlink()
    (text,) = problems(configure(resume=True))
    assert text.startswith(f"--resume: {run_dir.path / 'checkpoints'} holds no whole checkpoint")


def test_a_run_that_saved_elsewhere_is_not_begun_anew(configure, files):
    began(configure(save=str(files / "kept")), 3)
    assert f"saves in {files / 'kept'}, not in" in problems(configure(resume=True))[0]


def test_a_finished_run_without_checkpoints_is_not_wiped(configure):
    RunDir(configure(), "a run", []).close("finished")
    assert "is finished and left no checkpoint" in problems(configure(resume=True))[0]


@pytest.fixture
def saved(configure, files):
    """Checkpoints of another run."""
    began(configure(run_dir=str(files / "first")), 3)
    return str(files / "first" / "checkpoints")


def test_the_same_model_and_data_under_other_paths_are_the_same(configure, files, saved):
    (files / "model").rename(files / "moved")
    (files / "moved" / "config.json").write_text(json.dumps(MODEL | {"dtype": "float32", "transformers_version": "9"}))
    (files / "prompts.jsonl").rename(files / "also-moved.jsonl")
    config = configure(load=saved, hf_checkpoint=str(files / "moved"), prompts=str(files / "also-moved.jsonl"))
    assert problems(config) == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda f: (f / "model" / "config.json").write_text(json.dumps(MODEL | {"hidden_size": 64})),
         "its weights fit no other model; take the checkpoint's own hf directory"),
        (lambda f: (f / "model" / "tokenizer.json").write_text("[]"), "its weights know no other tokens"),
        (lambda f: (f / "prompts.jsonl").write_text('{"prompt": "b"}\n' * 4), "prompts.jsonl (lines 4, sha256 "),
    ],
)  # fmt: skip
def test_another_model_tokenizer_or_prompt_file_is_refused_with_both_values(configure, files, saved, change, expected):
    change(files)
    (text,) = [text for text in problems(configure(load=saved)) if text.startswith("checkpoint")]
    assert expected in text
    assert "this run has" in text


@pytest.mark.parametrize(
    ("options", "shown", "accepting"),
    [
        ({"n_samples_per_prompt": 4}, "n_samples_per_prompt 2; this run has n_samples_per_prompt 4",
         {"reset_data_source": True}),
        ({"rollout_seed": 7}, "rollout_seed 42; this run has rollout_seed 7", {"reset_data_source": True}),
    ],
)  # fmt: skip
def test_a_position_in_other_data_is_refused_until_it_is_given_up(configure, saved, options, shown, accepting):
    (text,) = problems(configure(load=saved, **options))
    assert shown in text
    assert "--reset-data-source begins with the first prompt" in text
    assert problems(configure(load=saved, **options, **accepting)) == []


def test_random_states_and_sharded_optimizers_belong_to_their_layout(configure, saved):
    parallel = ParallelOptions(actor_num_gpus_per_node=2, use_distributed_optimizer=True)
    optimizer, layout = problems(configure(parallel, load=saved))
    assert "whole on each rank; this run has optimizer AdamW, sharded" in optimizer
    assert "set --use-distributed-optimizer as it was, or --no-load-optim" in optimizer
    assert "layout 1 ranks, tensor 1, pipeline 1; this run has layout 2 ranks" in layout
    assert "--no-load-rng" in layout
    assert problems(configure(parallel, load=saved, load_optim=False, load_rng=False)) == []


def test_what_merely_changes_the_run_is_a_note(configure, saved):
    options = OptimizerOptions(lr=0.5, lr_decay_style="cosine")
    config = configure(options, load=saved, num_rollout=20, load_rng=False)
    assert problems(config) == []
    first, changed, schedule = check.notes(config)[:3]
    assert first.startswith("continued after rollout 3, from ")
    assert first.endswith("; with fresh random states")
    assert "lr 1e-06 → 0.5" in changed
    assert "run_dir" not in changed
    assert "the cosine decay ends at optimizer step 20, no longer at 10" in schedule


def test_a_damaged_checkpoint_is_named_in_the_plan(configure, files, saved):
    (Path(saved) / "rollout_000004").mkdir()
    (Path(saved) / "latest.json").write_text('{"directory": "rollout_000004"}')
    config = configure(load=saved)
    assert problems(config) == []
    text = "\n".join(check.notes(config))
    assert "rollout_000004 is damaged: it has no state.json" in text
    assert "continues from rollout_000003" in text


def test_flags_without_a_checkpoint_and_a_checkpoint_without_work_are_refused(configure, saved):
    (text,) = [text for text in check.check(configure(load_optim=False)) if "load-optim" in text]
    assert "pass --load or --resume" in text
    assert "nothing is left to train" in problems(configure(load=saved, num_rollout=4))[0]


FULL = """
import json
from miles_api.config import RunConfig
from miles_api.errors import DataError
from miles_api.run_options import RunOptions
from miles_train.driver.run_dir import RunDir
run_dir = RunDir(RunConfig.of(RunOptions(run_dir={path!r})), "a run", [])
try:
    for rollout_id in range(1000):
        {call}
except DataError as error:
    print(error)
    run_dir.close("failed", str(error))
"""


@pytest.mark.parametrize(
    ("file", "call"),
    [
        ("metrics.jsonl", "run_dir.log('rollout', rollout_id, {'loss': 1.0}, {})"),
        ("samples.jsonl", "run_dir.samples('train', rollout_id, [{'text': 'x' * 100}])"),
        ("hooks.json", "run_dir.hooks({'rollout': [{'hook': 'x' * 100}] * rollout_id})"),
    ],
)
def test_a_full_disk_is_one_error_that_names_the_file(tmp_path, file, call):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))  # noqa: E731
    run = subprocess.run(
        [sys.executable, "-c", FULL.format(path=str(tmp_path / "run"), call=call)],
        capture_output=True, text=True, check=False, preexec_fn=limit, timeout=60,
    )  # fmt: skip
    assert run.stdout == f"{tmp_path / 'run' / file} cannot be written: File too large\n"
    assert run.stderr == f"miles train: {tmp_path / 'run' / 'report.html'} cannot be written: File too large\n"
    assert run.returncode == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["rollout_id"] for line in lines] == list(range(len(lines)))
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "failed"


def test_a_report_that_cannot_be_written_is_an_error_of_a_run_that_did_not_fail(configure, monkeypatch):
    run_dir = RunDir(configure(), "a run", [])
    (run_dir.path / "report.html").mkdir()
    with pytest.raises(DataError, match=r"report\.html cannot be written"):
        run_dir.close("finished")


def test_a_sink_that_cannot_be_closed_costs_neither_the_outcome_nor_the_report(configure):
    class Broken:
        def close(self):
            raise RuntimeError("wandb: no network")

    run_dir = RunDir(configure(), "a run", [])
    run_dir._sinks = [Broken()]
    with pytest.raises(RuntimeError, match="no network"):
        run_dir.close("finished")
    assert json.loads((run_dir.path / "summary.json").read_text())["status"] == "finished"
    assert (run_dir.path / "report.html").is_file()
