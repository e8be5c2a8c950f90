"""The hooks that were configured are the hooks that run, or the run stops and says which are not."""

import json

import pytest

from miles_api.checks.check import CheckReport
from miles_api.checks.hook_rows import HookRow
from miles_api.config import RunConfig
from miles_api.errors import HookError
from miles_api.run_options import RunOptions
from miles_train.driver.hook_watch import HookWatch, code_differences, not_fired
from miles_train.driver.run_dir import RunDir


def said(hook, calls=0, **more):
    """What a process reports of a hook."""
    same = {"reference": f"my.py:{hook}", "file": "/here/my.py", "sha256": "a" * 64, "distribution": "", "version": ""}
    return {"hook": hook, **same, "calls": calls, "skipped": 0, **more}


def row(hook, **more):
    """What the driver's check found of it."""
    same = {"flag": f"--{hook}-path", "reference": f"my.py:{hook}", "file": "/here/my.py", "sha256": "a" * 64}
    return HookRow(hook=hook, **{"abi": "1.0", "checkable": True, **same, **more})


class Processes:
    """Stands for the services: answers with what a test puts in `reports`."""

    def __init__(self, **reports):
        self.reports = reports

    def hook_reports(self, patience=None):
        return {name.replace("_", " "): hooks for name, hooks in self.reports.items()}


@pytest.fixture
def watch(tmp_path):
    run_dir = RunDir(RunConfig.of(RunOptions(run_dir=str(tmp_path / "run"))), "a run", [])
    lines = []

    def make(hooks, **reports):
        watched = HookWatch(CheckReport(None, [], hooks), Processes(**reports), run_dir, lines.append)
        watched.lines, watched.file = lines, tmp_path / "run" / "hooks.json"
        return watched

    yield make
    run_dir.close("finished")


def test_a_hook_that_should_have_fired_and_did_not_stops_the_run_by_name(watch):
    watched = watch([row("reward"), row("generate")], rollout=[said("reward"), said("generate", 8)])
    watched.started()
    with pytest.raises(HookError, match=r"in the first rollout should have been called were not") as error:
        watched.after("rollout")
    assert "reward hook my.py:reward (--reward-path): was loaded and not called" in str(error.value)
    assert "generate" not in str(error.value)
    assert watched.lines == []


def test_one_process_that_called_it_is_enough_and_so_is_a_moment_with_nothing_to_do(watch):
    ranks = {"trainer_0": [said("loss")], "trainer_1": [said("loss", 3)]}
    watched = watch([row("loss"), row("reward")], rollout=[said("reward", skipped=8)], **ranks)
    watched.after("rollout")
    assert watched.lines == ["every configured hook was called: loss, reward"]


def test_a_hook_that_the_user_did_not_name_is_not_talked_about(watch):
    watched = watch([row("rollout", reference="sft")], rollout=[said("rollout", 1, reference="sft")])
    watched.after("rollout")
    assert watched.lines == ["every configured hook was called: rollout"]
    derived = CheckReport(RunConfig.of().replace(rollout_function_path="sft"), [], [row("rollout", reference="sft")])
    lines = []
    HookWatch(derived, watched._services, watched._run_dir, lines.append).after("rollout")
    assert lines == []


def test_a_hook_that_this_run_does_not_call_need_not_fire(watch):
    watch([row("reward", called=False, note="supervised")], rollout=[]).after("rollout")


def test_a_hook_that_no_process_loaded_is_told_from_one_that_was_not_called():
    assert not_fired([row("reward")], {"rollout": []}, "rollout") == [
        "reward hook my.py:reward (--reward-path): no process loaded it"
    ]


def test_the_calls_of_a_hook_within_another_are_that_ones_business():
    whole, part = row("reward"), row("reward", reference="my.py:part", part_of="weighted")
    assert not_fired([whole, part], {"rollout": [said("reward", 3)]}, "rollout") == []
    reports = {"driver": [said("reward", sha256="b" * 64)], "rollout": [said("reward", part_of="weighted")]}
    assert len(code_differences(reports)) == 1


def test_a_class_is_used_once_it_is_loaded():
    assert not_fired([row("data_source")], {"rollout": [said("data_source")]}, "start") == []
    assert not_fired([row("data_source")], {"rollout": []}, "start") != []


def test_what_the_driver_checked_is_not_what_a_process_ran():
    checked = {"hook": "reward", "reference": "my.py:reward", "sha256": "a" * 64}
    (silent,) = not_fired([row("reward")], {"driver": [checked]}, "rollout")
    assert "no process loaded it" in silent


@pytest.mark.parametrize(
    ("hook", "moment"), [("megatron_init", "start"), ("eval_rollout_log", "eval"), ("post_save", "save")]
)
def test_each_moment_demands_its_own_hooks_once(watch, hook, moment):
    watched = watch([row(hook)], rollout=[said(hook)])
    watched.after("rollout")
    with pytest.raises(HookError, match=hook):
        watched.after(moment)
    watched.after(moment)


def test_of_two_hooks_under_one_flag_each_must_fire():
    rows = [row("dynamic_filter"), row("dynamic_filter", reference="other:fn")]
    reports = {"rollout": [said("dynamic_filter", 4), said("dynamic_filter", reference="other:fn")]}
    (silent,) = not_fired(rows, reports, "rollout")
    assert "other:fn" in silent


def test_a_process_that_loaded_another_file_stops_the_run_before_the_first_rollout(watch):
    watched = watch([row("reward")], rollout=[said("reward", sha256="b" * 64, file="/there/my.py")])
    with pytest.raises(HookError) as error:
        watched.started()
    for part in ("reward", "a" * 64, "b" * 64, "/here/my.py", "/there/my.py", "driver", "rollout"):
        assert part in str(error.value)


def test_ranks_are_compared_with_each_other_where_the_driver_could_not_read_the_hook(watch):
    unread = row("loss", abi="", sha256="", file="")
    ranks = {"trainer_0": [said("loss", version="1")], "trainer_1": [said("loss", version="2")]}
    with pytest.raises(HookError, match=r"version 1 in trainer 0 .*, 2 in trainer 1"):
        watch([unread], **ranks).started()
    ranks["trainer_1"] = ranks["trainer_0"]
    watch([unread], **ranks).started()


def test_the_same_code_in_another_place_is_the_same():
    reports = {"driver": [said("reward")], "rollout": [said("reward", file="/elsewhere/my.py")]}
    assert code_differences(reports) == []


def test_hooks_json_holds_the_hooks_of_every_process(watch):
    watched = watch([row("reward")], rollout=[said("reward", 1)], trainer_0=[said("loss", 2)], router=[])
    watched.collect()
    assert [(h["process"], h["hook"]) for h in json.loads(watched.file.read_text())] == [
        ("driver", "reward"), ("rollout", "reward"), ("trainer 0", "loss"),
    ]  # fmt: skip
    watched.rollout([said("reward", 5)])
    assert [h.get("calls") for h in json.loads(watched.file.read_text())] == [None, 5, 2]
