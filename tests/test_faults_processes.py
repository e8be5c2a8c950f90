"""Processes of a run that hang, die or are interrupted: it ends in seconds, says why, and leaves nothing behind."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from miles_train.driver import checkpoint

START, END = 200, 30
PATIENCE = 45
"""Seconds for ranks that may have to start beside other work, and until one that hangs is told of."""
MARK = "MILES_TEST_OF_FAULTS"

HOOKS = """
import os, time
from pathlib import Path

HERE = Path(__file__).parent
WHERE = (HERE / "where").read_text()

def stay(*moments):
    if WHERE in moments:
        (HERE / "reached").write_text("")
        time.sleep(1000)

def score(args, sample):
    # Held-out prompts, where there are any, are scored before the first rollout.
    stay("evaluate", "rollout")
    return len(sample.response) % 2

def before_step(args, rollout_id, step, model, optimizer, scheduler):
    import torch.distributed as dist
    if dist.get_rank() == dist.get_world_size() - 1:
        stay("train")
        if WHERE == "weight sync":
            (HERE / "reached").write_text("")
            while not (HERE / "go_on").exists():
                time.sleep(0.05)

def saved(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    stay("save")
"""


class Run:
    """A run in the background, with hooks that stay at one moment; its processes are found by their environment."""

    def __init__(self, folder, words, moment):
        self.folder, self._mark = folder, uuid.uuid4().hex
        (folder / "hooks.py").write_text(HOOKS)
        (folder / "where").write_text(moment)
        self._errors = folder / "stderr"
        with self._errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "miles_api.cli", "train", *words], stdout=subprocess.DEVNULL, stderr=errors,
                env={**os.environ, MARK: self._mark}, start_new_session=True,
            )  # fmt: skip

    def processes(self):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def one(self, name):
        """Return a process by the file that it keeps for its stacks."""
        (file,) = (self.folder / "run" / "stacks").glob(f"{name}-*.txt")
        return psutil.Process(int(file.stem.rpartition("-")[2]))

    @property
    def said(self):
        return self._errors.read_text()

    def wait(self, condition):
        deadline = time.monotonic() + START
        while not condition():
            assert time.monotonic() < deadline, self.said
            assert self.process.poll() is None, self.said
            time.sleep(0.02)

    def reach(self):
        """Wait until a hook stays."""
        self.wait((self.folder / "reached").exists)
        return self

    def end(self):
        """Wait for the end, and require that it left nothing behind."""
        code = self.process.wait(END)
        assert self.left() == []
        assert list(Path("/dev/shm").glob(f"miles-weights-{self.process.pid}-*")) == []
        summary = json.loads((self.folder / "run" / "summary.json").read_text())
        assert summary["exit_code"] == code
        assert (self.folder / "run" / "report.html").exists()
        return code, summary

    def left(self, patience=END):
        _, left = psutil.wait_procs(self.processes(), timeout=patience)
        return [p.cmdline() for p in left]


@pytest.fixture
def start(small_run, quickstart_data, tmp_path):
    """Start a run that stays at a moment."""
    with contextlib.ExitStack() as stack:

        def started(moment, *flags, **options):
            hooks = f"{tmp_path}/hooks.py"
            (tmp_path / "run.toml").write_text('[hooks]\ncustom_rm_path = "hooks.py:score"\n')
            values = {
                "custom_megatron_before_train_step_hook_path": f"{hooks}:before_step",
                "custom_megatron_post_save_hook_path": f"{hooks}:saved", "label_key": "label",
                "rollout_max_response_len": 8, "save_interval": 1, **options,
            }  # fmt: skip
            words = small_run(**values)[1:]
            if moment != "evaluate":
                at = words.index("--eval-prompt-data")
                del words[at : at + 2]
            run = Run(tmp_path, [str(tmp_path / "run.toml"), *words, *flags], moment)
            stack.callback(lambda: [process.kill() for process in run.processes()])
            return run

        yield started


def test_a_rank_that_hangs_ends_the_run_with_its_line_and_the_stacks_of_all_processes(start):
    run = start("train", actor_num_gpus_per_node=2, trainer_timeout=PATIENCE).reach()
    rank = run.one("trainer-1")
    run.process.wait(PATIENCE + END)
    code, summary = run.end()
    assert code == 1
    late = f"train.train did not return within --trainer-timeout {PATIENCE} s from trainer 0, trainer 1"
    assert late in summary["error"]
    frames = summary["error"].partition("trainer 1, innermost frame first:\n")[2].splitlines()
    assert f'"{run.folder}/hooks.py"' in frames[0]
    files = {path.stem.rpartition("-")[0]: path for path in (run.folder / "run" / "stacks").iterdir()}
    assert set(files) == {"driver", "engine", "rollout", "router", "trainer-0", "trainer-1"}
    assert files["trainer-1"].stem.endswith(f"-{rank.pid}")
    assert all("most recent call first" in path.read_text() for path in files.values())


def test_a_killed_rank_ends_the_run_though_the_others_wait_for_it(start):
    run = start("train", actor_num_gpus_per_node=2).reach()
    rank = run.one("trainer-1")
    rank.kill()
    code, summary = run.end()
    assert code == 1
    assert f"trainer 1 (pid {rank.pid}) died during train.train" in summary["error"]
    assert "it can only begin anew" in summary["error"]


def test_a_killed_rollout_process_ends_the_run(start):
    run = start("rollout", "--debug-rollout-only").reach()
    run.one("rollout").kill()
    code, summary = run.end()
    assert code == 1
    assert "rollout (pid " in summary["error"]
    assert "died during rollout.generate" in summary["error"]


def test_nothing_outlives_a_driver_that_is_killed(start):
    run = start("train").reach()
    assert len(run.processes()) > 5
    run.process.kill()
    run.process.wait()
    # Ray's two agents look for the GCS for a minute, which ended with the driver; what is ours ends at once.
    assert run.left(patience=90) == []


@pytest.mark.parametrize("phase", [pytest.param("ray", marks=pytest.mark.nightly), "trainer processes"])
def test_ctrl_c_ends_a_run_that_starts(start, phase):
    run = start("never")
    run.wait(lambda: f"] starting {phase}" in run.said)
    # As a terminal does it: to the whole process group.
    os.killpg(run.process.pid, signal.SIGINT)
    code, summary = run.end()
    assert code == 128 + signal.SIGINT
    assert (summary["status"], summary["error"].splitlines()[0]) == ("interrupted", "interrupted by SIGINT")


def driver(run):
    return [run.process]


@pytest.mark.parametrize(
    ("moment", "signalled"),
    # Some schedulers signal every process of a job.
    [
        ("evaluate", driver),
        pytest.param("rollout", driver, marks=pytest.mark.nightly),
        ("train", Run.processes),
        pytest.param("save", driver, marks=pytest.mark.nightly),
    ],
)
def test_a_run_is_interrupted_at_any_moment_and_a_second_signal_changes_nothing(start, moment, signalled):
    run = start(moment, *["--debug-rollout-only"] * (moment == "evaluate")).reach()
    for process in signalled(run):
        process.terminate()
    run.wait(lambda: "SIGTERM: stopping" in run.said)
    os.killpg(run.process.pid, signal.SIGINT)
    code, summary = run.end()
    assert code == 128 + signal.SIGTERM
    assert summary["status"] == "interrupted"
    assert summary["error"].startswith("interrupted by SIGTERM")
    assert "SIGINT: still stopping" in run.said
    assert not (run.folder / "run" / "stacks").exists()
    checkpoints = run.folder / "run" / "checkpoints"
    assert checkpoint.holds_checkpoints(checkpoints) == (moment == "save")
    if moment == "save":
        found, state, remarks = checkpoint.find(checkpoints)
        assert (state.rollout_id, remarks) == (0, [])
        assert f"from {found}:\n  miles train {run.folder}/run/config.toml --resume" in summary["error"]


def test_a_run_is_interrupted_while_an_engine_does_not_take_its_weights(start):
    run = start("weight sync").reach()
    run.one("engine").suspend()
    (folder,) = Path("/dev/shm").glob(f"miles-weights-{run.process.pid}-*")
    before = set(folder.rglob("*.safetensors"))
    (run.folder / "go_on").touch()
    run.wait(lambda: set(folder.rglob("*.safetensors")) - before)
    run.process.terminate()
    assert run.end()[0] == 128 + signal.SIGTERM
