import json
from pathlib import Path

import pytest

from miles_api.run_options import RunOptions
from miles_train.driver import checkpoint
from miles_train.driver.run import _way_on


@pytest.fixture
def stopped(tmp_path):
    """The directory of a run that saved after its fifth rollout and then failed."""
    folder = tmp_path / "a run"
    folder.mkdir()
    (folder / "summary.json").write_text(json.dumps({"id": "7f", "status": "failed", "save": None}))
    state = checkpoint.State(rollout_id=4, weight_version=5, run="7f")
    checkpoint.write(folder / "checkpoints", state, {"trainer": lambda part: Path(part, "x").write_text("")})
    return folder


def test_the_command_that_goes_on_is_one_that_a_shell_takes(stopped):
    assert _way_on(RunOptions(run_dir=str(stopped))) == (
        f"it can go on after rollout 4, from {stopped}/checkpoints/rollout_000004:\n"
        f"  miles train '{stopped}/config.toml' --resume"
    )


def test_a_run_that_emptied_its_directory_does_not_do_so_again(stopped):
    assert _way_on(RunOptions(run_dir=str(stopped), overwrite=True)).endswith(" --resume --no-overwrite")


def test_the_checkpoint_that_a_run_began_from_is_not_its_own(stopped, tmp_path):
    other = RunOptions(run_dir=str(tmp_path / "other"), load=str(stopped / "checkpoints"))
    assert _way_on(other) == f"it has left no checkpoint in {tmp_path}/other/checkpoints yet: it can only begin anew"
