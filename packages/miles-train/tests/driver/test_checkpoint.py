"""Whatever ends a save or damages a folder: what is found is whole, and what stays behind is said."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from miles_api.errors import DataError
from miles_train.driver import checkpoint
from miles_train.driver.checkpoint import State


def fill(text):
    return lambda folder: Path(folder, "file").write_text(text)


def save(folder, *rollout_ids, run="ours", **parts):
    for rollout_id in rollout_ids:
        state = State(rollout_id=rollout_id, weight_version=rollout_id + 1, run=run)
        checkpoint.write(folder, state, parts or {"trainer": fill("x"), "rollout": fill("y")})


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_is_found_with_all_its_parts(tmp_path):
    save(tmp_path, 1, 2)
    folder, state, remarks = checkpoint.find(tmp_path)
    assert (state.rollout_id, state.weight_version, state.run) == (2, 3, "ours")
    assert (folder / "rollout" / "file").read_text() == "y"
    assert checkpoint.find(tmp_path / "rollout_000001")[1].rollout_id == 1
    assert remarks == []


def full_disk(folder):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f"{folder}/shard")


def refusing(folder):
    raise DataError(f"{folder} cannot be written: No space left on device")


@pytest.mark.parametrize("part", [full_disk, refusing])
@pytest.mark.parametrize("position", [0, 1])
def test_a_part_that_cannot_be_written_leaves_nothing_but_the_last_checkpoint(tmp_path, part, position):
    save(tmp_path, 1)
    parts = [("trainer", fill("half")), ("rollout", fill("half"))]
    parts[position] = (parts[position][0], part)
    with pytest.raises(DataError, match="No space left on device") as caught:
        save(tmp_path, 2, **dict(parts))
    text = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert parts[position][0] in text
    assert f"{tmp_path / 'rollout_000002'} was not written; rollout_000001 is still the latest checkpoint" in text
    assert names(tmp_path) == ["latest.json", "rollout_000001"]
    assert checkpoint.find(tmp_path)[1].rollout_id == 1


def test_the_first_checkpoint_that_fails_says_that_there_is_none(tmp_path):
    with pytest.raises(DataError, match="there is no earlier checkpoint"):
        save(tmp_path, 0, trainer=full_disk)
    assert names(tmp_path) == []


@pytest.mark.parametrize("point", ["state", "rename", "pointer"])
def test_a_kill_at_any_point_of_a_save_leaves_a_checkpoint_that_is_found(tmp_path, monkeypatch, point):
    """The process is gone at once: nothing of it cleans up."""
    save(tmp_path, 1)
    ends = {"state": "state.json", "pointer": "latest.json"}.get(point)
    script = f"""
import os
from pathlib import Path
from miles_train.driver import checkpoint

def die(*_):
    os._exit(9)

write_file, rename_over = checkpoint._write_file, checkpoint._rename_over
if {point!r} == "rename":
    checkpoint._rename_over = die
else:
    checkpoint._write_file = lambda path, content: (
        die() if path.name.endswith({ends!r}) else write_file(path, content)
    )
state = checkpoint.State(rollout_id=2, weight_version=3, run="ours")
checkpoint.write(Path({str(tmp_path)!r}), state, {{"trainer": lambda folder: Path(folder, "file").write_text("x")}})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert checkpoint.find(tmp_path)[1].rollout_id == 1
    checkpoint.sweep(tmp_path)
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    save(tmp_path, 2)
    assert checkpoint.find(tmp_path)[1].rollout_id == 2


def test_a_checkpoint_that_lost_a_file_is_passed_over_and_that_is_said(tmp_path):
    save(tmp_path, 1, 2, 3)
    (tmp_path / "rollout_000003" / "trainer" / "file").unlink()
    (tmp_path / "rollout_000002" / "rollout" / "file").write_text("")
    _, state, remarks = checkpoint.find(tmp_path)
    assert state.rollout_id == 1
    text = "\n".join(remarks)
    assert "rollout_000003 is damaged: trainer/file is missing" in text
    assert "rollout_000002 is damaged: rollout/file has 0 bytes, not 1" in text
    assert "the run continues from rollout_000001" in text


def test_a_half_deleted_latest_checkpoint_is_passed_over(tmp_path):
    save(tmp_path, 1, 2)
    shutil.rmtree(tmp_path / "rollout_000002")
    assert checkpoint.find(tmp_path)[1].rollout_id == 1


def test_checkpoints_of_a_future_that_was_given_up_are_not_taken_for_the_latest(tmp_path):
    save(tmp_path, 5, 2, 3)
    (tmp_path / "rollout_000003" / "state.json").unlink()
    assert checkpoint.find(tmp_path)[1].rollout_id == 2


def test_a_damaged_checkpoint_that_was_asked_for_is_refused_and_so_is_a_folder_of_them(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "rollout_000001" / "trainer" / "file").unlink()
    with pytest.raises(DataError, match="no whole checkpoint: trainer/file is missing"):
        checkpoint.find(tmp_path / "rollout_000001")
    with pytest.raises(DataError, match=r"holds no whole checkpoint\n.*trainer/file is missing"):
        checkpoint.find(tmp_path)


def test_a_pointer_that_cannot_be_read_is_done_without(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / checkpoint.LATEST).write_text("{")
    assert checkpoint.find(tmp_path)[1].rollout_id == 2


def test_a_directory_without_a_checkpoint_is_an_error(tmp_path):
    with pytest.raises(DataError, match="holds no checkpoint"):
        checkpoint.find(tmp_path)


def test_a_newer_format_is_refused(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "rollout_000001" / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(DataError, match="a newer Miles wrote it, in format 99"):
        checkpoint.find(tmp_path)


def test_the_oldest_checkpoints_of_this_run_are_deleted_and_no_others(tmp_path):
    save(tmp_path, 1, run="theirs")
    save(tmp_path, 2, 3, 4, 5)
    checkpoint.retain(tmp_path, "ours", 2, spare=tmp_path / "rollout_000002")
    assert names(tmp_path) == ["latest.json"] + [f"rollout_00000{n}" for n in (1, 2, 4, 5)]


def test_a_checkpoint_that_the_pointer_does_not_name_yet_costs_no_older_one(tmp_path):
    """The kill came between a save's two renames: the run goes on from the one before."""
    save(tmp_path, 4)
    pointer = (tmp_path / checkpoint.LATEST).read_bytes()
    save(tmp_path, 6)
    (tmp_path / checkpoint.LATEST).write_bytes(pointer)
    checkpoint.retain(tmp_path, "ours", 1)
    assert checkpoint.find(tmp_path)[1].rollout_id == 4
    save(tmp_path, 6)
    checkpoint.retain(tmp_path, "ours", 1)
    assert names(tmp_path) == ["latest.json", "rollout_000006"]


def test_a_deletion_that_was_killed_is_finished_by_the_next_start(tmp_path, monkeypatch):
    save(tmp_path, 1, 2)
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda path: Path(path, "state.json").unlink())
    checkpoint.retain(tmp_path, "ours", 1)
    monkeypatch.undo()
    assert checkpoint.find(tmp_path)[1].rollout_id == 2
    assert [name for name in names(tmp_path) if name.endswith(".removed")]
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == ["latest.json", "rollout_000002"]


def test_files_that_are_not_ours_survive_the_sweep(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".notes").write_text("mine")
    (tmp_path / ".rollout_000001.staging-of-mine").mkdir()
    checkpoint.sweep(tmp_path)
    assert names(tmp_path) == [".notes", ".rollout_000001.staging-of-mine", "latest.json", "rollout_000001"]


def test_a_file_that_may_not_grow_ends_the_save_with_its_name(tmp_path):
    """A real refusal by the system: RLIMIT_FSIZE."""
    save(tmp_path, 1)
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from miles_train.driver import checkpoint\n"
        "big = lambda folder: Path(folder, 'shard').write_bytes(bytes(10_000))\n"
        "state = checkpoint.State(rollout_id=2, weight_version=3)\n"
        "try:\n"
        f"    checkpoint.write(Path({str(tmp_path)!r}), state, {{'trainer': big}})\n"
        "except checkpoint.DataError as error:\n"
        "    print(error)\n"
    )
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # noqa: E731
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, preexec_fn=limit, timeout=60
    )  # fmt: skip
    assert "File too large" in run.stdout
    assert str(tmp_path) in run.stdout
    assert names(tmp_path) == ["latest.json", "rollout_000001"]
