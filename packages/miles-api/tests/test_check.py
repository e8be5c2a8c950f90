"""Checks before start, with whatever packages are installed: here, toys."""

import json
import types
from pathlib import Path
from typing import Annotated

import msgspec
import pytest

from miles_api import config as config_module
from miles_api.checks import check
from miles_api.cli.check_command import command
from miles_api.errors import ConfigError, HookLoadError
from miles_api.hook_options import HookOptions
from miles_api.options import Options
from miles_api.parsing import parse
from miles_api.record import DumpHeader, DumpWriter, RecordedRollout
from miles_api.run_options import RunOptions

BATCH = ["--rollout-batch-size", "4"]


class ToyOptions(Options, frozen=True, kw_only=True):
    """A group of a package."""

    toy_size: Annotated[int, msgspec.Meta(ge=1)] = 3
    """How large."""


def side(hooks=(), idle=None, problems=(), **more):
    """A check module of an installed package."""
    return types.SimpleNamespace(
        HOOKS=frozenset(hooks), idle=lambda config: idle or {}, check=lambda config: iter(problems), **more
    )


@pytest.fixture
def installed(monkeypatch):
    """Install check modules by side; none to begin with."""
    chosen = {"run": RunOptions, "hooks": HookOptions, "toy": ToyOptions}
    monkeypatch.setattr(parse, "option_groups", lambda: chosen)
    monkeypatch.setattr(config_module, "option_groups", lambda: chosen)

    def install(**modules):
        points = {name: [types.SimpleNamespace(dist=None, value=f"toy-{name}")] for name in modules}
        monkeypatch.setattr(check, "entry_points", lambda group: points)

        def provide(group, name):
            if isinstance(modules[name], Exception):
                raise modules[name]
            return modules[name]

        monkeypatch.setattr(check, "provider", provide)

    install()
    return install


@pytest.fixture
def hook_file(tmp_path):
    def write(text, name="my_hooks.py"):
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def words(*more):
    return check.check_words([*BATCH, *map(str, more)], prog="miles check")


def messages(*more):
    return [problem.message for problem in words(*more).problems]


REWARD = "def score(args, sample):\n    return 1.0\n"


def test_an_author_with_miles_api_alone_sees_the_hook_and_what_could_not_be_checked(installed, hook_file):
    file = hook_file(REWARD)
    report = words("--custom-rm-path", f"{file}:score")
    assert report.problems == []
    (row,) = report.hooks
    assert (row.hook, row.file, len(row.sha256), row.checkable, row.abi) == ("reward", file, 64, True, "1.0")
    assert (row.called, row.note) == (False, "miles-rollout, which calls it, is not installed")
    assert [text.partition(": ")[2] for text in report.not_checked] == [
        "miles-rollout is not installed", "miles-train is not installed", "miles-router is not installed",
    ]  # fmt: skip


def test_tables_of_packages_that_are_not_installed_are_left_unread_and_others_are_unknown(installed, tmp_path):
    (tmp_path / "run.toml").write_text("[run]\nrollout_batch_size = 4\n[optimizer]\nlr = 1\n[optimiser]\nlr = 1\n")
    report = check.check_words([str(tmp_path / "run.toml")], prog="miles check")
    assert [problem.message for problem in report.problems] == ["run.toml: unknown table [optimiser]"]
    assert any("unknown table [optimizer]" in text for text in report.not_checked)
    installed(train=side())
    assert len(check.check_words([str(tmp_path / "run.toml")], prog="miles check").problems) == 2


def test_values_that_cannot_be_read_and_checks_that_fail_come_in_one_report(installed):
    installed(train=side(problems=["--hf-checkpoint /x holds no weights"]))
    found = messages("--toy-size", 0, "--nonsense", "--load-debug-rollout-data", "/no/such/dump")
    # The short name `recorded`, which follows from the last flag, is offered by miles-rollout.
    assert len([problem for problem in found if "--rollout-function-path recorded" not in problem]) == 4
    assert [problem.flag for problem in words("--toy-size", 0).problems] == ["--toy-size", "--hf-checkpoint"]


def test_what_follows_only_from_a_value_that_cannot_be_read_is_not_reported(installed):
    found = check.check_words(["--rollout-batch-size", "many"], prog="miles check").problems
    assert [problem.flag for problem in found] == ["--rollout-batch-size"]
    assert "'many'" in found[0].message


def test_a_problem_in_a_file_names_its_flag_too(installed, tmp_path):
    (tmp_path / "run.toml").write_text("[run]\nrollout_batch_size = 4\nnum_rollout = 0\n")
    (problem,) = check.check_words([str(tmp_path / "run.toml")], prog="miles check").problems
    assert (problem.flag, problem.package) == ("--num-rollout", "miles-api")


def test_a_problem_names_the_package_that_found_it_and_two_lines_are_two_problems(installed):
    installed(rollout=side(problems=["--rm-type mth is none of math\n  or f1\n--reward-key is missing"]))
    assert [(p.flag, p.package) for p in words().problems] == [
        ("--rm-type", "toy-rollout"), ("--reward-key", "toy-rollout"),
    ]  # fmt: skip


def test_a_hook_that_nothing_installed_calls_is_refused_and_one_that_idles_is_not(installed, hook_file):
    given = ["--custom-rm-path", f"{hook_file(REWARD)}:score"]
    installed(rollout=side())
    assert messages(*given) == [
        "--custom-rm-path is set, but nothing installed calls the reward hook: it would never run"
    ]
    installed(rollout=side(hooks=["reward"], idle={"reward": "supervised"}))
    report = words(*given)
    assert report.problems == []
    assert [(row.called, row.note) for row in report.hooks] == [(False, "supervised")]


def test_a_check_module_that_cannot_be_imported_is_a_problem_and_not_a_crash(installed):
    installed(rollout=ImportError("No module named 'jinja2'"), train=HookLoadError("offered twice"))
    assert messages() == [
        "the checks of toy-rollout cannot be imported: No module named 'jinja2'", "offered twice",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flag", "refused"), [("--custom-megatron-init-path", False), ("--custom-rollout-log-function-path", True)]
)
def test_only_a_hook_of_the_trainer_may_lack_a_package_here(installed, hook_file, flag, refused):
    installed(train=side(hooks=["megatron_init"]), rollout=side(hooks=["rollout_log"]))
    file = hook_file("import megatron_that_is_not_here\ndef fn(args, *more):\n    pass\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("miles_api.checks.hook_rows.TRAINER_PACKAGES", ("megatron_that_is_not_here",))
        report = words(flag, f"{file}:fn")
    assert bool(report.problems) is refused
    if not refused:
        (row,) = report.hooks
        # The file that the reference names need not be the one that defines the hook, which a rank will hash.
        assert (row.called, row.checkable, row.file, row.sha256) == (True, False, file, "")
        assert row.note == "checked on a trainer rank: megatron_that_is_not_here is not installed here"


def test_a_hook_that_does_not_fit_is_a_problem_of_its_own(installed, hook_file):
    installed(rollout=side(hooks=["reward"]))
    found = messages("--custom-rm-path", f"{hook_file('def score(): ...')}:score")
    assert len(found) == 1
    assert "miles calls:" in found[0]


def test_the_abort_beside_an_agent_is_shown_as_a_hook(installed, hook_file):
    file = hook_file("async def run(a, b, c, d, **k): ...\ndef abort(args): ...\n")
    installed(rollout=side(hooks=["agent", "agent_abort"]))
    assert [row.hook for row in words("--custom-agent-function-path", f"{file}:run").hooks] == ["agent", "agent_abort"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--custom-loss-function-path", "FILE:loss"], "with --loss-type custom_loss only, not with policy_loss"),
        (["--generate-execute-tool-function-path", "FILE:tool"], "needs --generate-tool-specs-path"),
        (["--generate-tool-specs-path", "FILE:specs"], "needs --generate-execute-tool-function-path"),
        (["--debug-rollout-only", "--load", "/ckpt"], "cannot --load /ckpt"),
        (["--debug-rollout-only", "--save-debug-train-data", "FILE.new"], "no trainer runs"),
        (["--debug-rollout-only", "--load-debug-rollout-data", "/x"], "would neither generate nor train"),
        (["--load-debug-rollout-data", "/no/dump"], "/no/dump: there is no such file"),
        (["--save-debug-rollout-data", "FILE"], "exists already: choose another file, or continue its run"),
        (["--save-debug-rollout-data", "FILE/dump"], "a folder of its path is a file"),
        (["--save-debug-rollout-data", "FOLDER"], "is a directory: name a file"),
        (["--save-debug-rollout-data", "FILE.x", "--save-debug-train-data", "FILE.x"], "one file each"),
    ],
)
def test_options_that_contradict_each_other_or_a_file_are_refused(installed, hook_file, flags, expected):
    file = hook_file(
        "def loss(a, b, c, d, **k): ...\nasync def tool(name, params): ...\nspecs = [{'type': 'function'}]\n"
    )
    given = [flag.replace("FILE", file).replace("FOLDER", str(Path(file).parent)) for flag in flags]
    assert [text for text in messages(*given) if expected in text]


def test_companions_that_are_both_there_are_fine(installed, hook_file):
    file = hook_file("def loss(a, b, c, d, **k): ...\nasync def tool(name, params): ...\nspecs = []\n")
    given = ["--loss-type", "custom_loss", "--custom-loss-function-path", f"{file}:loss"]
    tools = ["--generate-execute-tool-function-path", f"{file}:tool", "--generate-tool-specs-path", f"{file}:specs"]
    assert messages(*given, *tools) == []


@pytest.fixture
def dump(tmp_path):
    def write(count, kind="rollout"):
        path = str(tmp_path / f"{count}.mdump")
        writer = DumpWriter(path, DumpHeader(schema=1, kind=kind, abi=(1, 0), miles_api="0.1", config={}, tokenizer=""))
        for rollout_id in range(count):
            writer.write(
                RecordedRollout(
                    rollout_id=rollout_id, weight_version="0", evaluation=False, groups=[], raw_rewards=None,
                    rewards=None, metrics={},
                )
            )  # fmt: skip
        writer.close()
        return path

    return write


def test_a_recording_that_holds_every_rollout_is_trained_from_without_engines(installed, dump):
    report = words("--load-debug-rollout-data", dump(3), "--num-rollout", 3)
    assert [problem for problem in report.problems if "recorded" not in problem.message] == []
    assert report.config.args.rollout_function_path == "recorded"


def test_a_recording_that_is_too_short_or_of_another_kind_or_damaged_is_refused(installed, dump):
    assert [text for text in messages("--load-debug-rollout-data", dump(2), "--num-rollout", 3) if "2 rollouts" in text]
    train = dump(0, kind="train")
    assert [text for text in messages("--load-debug-rollout-data", train) if "holds train batches" in text]
    torn = Path(dump(3))
    torn.write_bytes(torn.read_bytes()[:-3])
    found = messages("--load-debug-rollout-data", torn, "--num-rollout", 3)
    assert [text for text in found if "rollout 2 is missing; its end is damaged" in text]
    torn.write_bytes(b"not a dump")
    assert [text for text in messages("--load-debug-rollout-data", torn) if str(torn) in text]


def test_a_recording_may_be_continued_or_replaced_with_its_run(installed, dump, tmp_path):
    file = dump(2)
    given = ["--save-debug-rollout-data", file]
    assert [text for text in messages(*given) if "exists already" in text]
    assert not [text for text in messages(*given, "--load", tmp_path) if "exists already" in text]
    assert not [text for text in messages(*given, "--run-dir", tmp_path, "--overwrite") if "exists already" in text]


def test_evaluation_hooks_of_a_run_without_evaluation_are_marked(installed, hook_file):
    file = hook_file("def log(*args):\n    return True\n")
    installed(rollout=side(hooks=["eval_rollout_log"]))
    given = ["--custom-eval-rollout-log-function-path", f"{file}:log"]
    assert [row.note for row in words(*given).hooks] == ["--eval-interval is not set"]
    (row,) = words(*given, "--eval-interval", 2).hooks
    assert (row.called, row.checkable) == (True, False)


def test_what_a_package_derives_is_part_of_the_run_and_of_its_plan(installed, hook_file):
    reference = f"{hook_file(REWARD)}:score"
    installed(rollout=side(hooks=["reward"], derived=lambda config: {"custom_rm_path": reference}))
    report = words()
    assert [row.reference for row in report.hooks] == [reference]
    assert report.config.sources["custom_rm_path"] == "derived"


def test_check_all_raises_what_the_report_says(installed):
    config = parse.parse_run(["--debug-rollout-only", "--load", "/ckpt"])
    with pytest.raises(ConfigError, match=r"batch size: set --rollout-batch-size[^\n]*\n.*cannot --load /ckpt"):
        check.check_all(config)


def test_json_is_one_object_with_problems_plan_and_hooks(installed, hook_file, capsys):
    installed(rollout=side(hooks=["reward"], notes=lambda config: ["a note"]))
    file = hook_file(REWARD)
    assert command.main([*BATCH, "--json", "--custom-rm-path", f"{file}:score", "--num-rollout", "0"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert said["ok"] is False
    assert said["problems"] == [
        {"message": "--num-rollout = '0': Expected `int` >= 1", "package": "miles-api", "flag": "--num-rollout"}
    ]
    assert said["plan"]["rollout_batch_size"] == 4
    assert said["plan"]["notes"] == ["a note"]
    (hook,) = said["hooks"]
    assert set(hook) == {
        "hook", "flag", "reference", "file", "sha256", "distribution", "version", "abi", "checkable", "called", "note",
        "part_of",
    }  # fmt: skip
    assert hook["called"] is True


def test_exit_codes_are_0_and_2_and_the_help_says_so(installed, capsys):
    assert command.main(BATCH) == 0
    installed(rollout=side(), train=side(), router=side())
    assert command.main(BATCH) == 0
    assert capsys.readouterr().out.endswith("ok: nothing wrong was found\n")
    installed()
    assert command.main([*BATCH, "--num-rollout", "0", "--toy-size", "0"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("miles check: 2 problems\n")
    assert command.main(["--help"]) == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith("usage: miles check [RUN.toml] [--json] [--flag value …]\n")
    assert "0  nothing is wrong" in help_text


def test_words_that_cannot_be_split_are_a_problem_without_a_plan(installed, capsys):
    assert command.main(["--json", "--num-rollout"]) == 2
    said = json.loads(capsys.readouterr().out)
    assert "--num-rollout" in said["problems"][0]["message"]
    assert said["plan"] == {}


def test_the_verdict_says_what_was_not_checked(installed, capsys):
    assert command.main([*BATCH, "--global-batch-size", "4"]) == 0
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("ok: nothing wrong was found in what could be checked; not checked: ")
    assert all(f"miles-{side} is not installed" in verdict for side in ("rollout", "train", "router"))


@pytest.mark.parametrize("text", [None, "[run\n"])
def test_a_run_file_that_cannot_be_read_is_the_only_problem_and_there_is_no_plan(installed, tmp_path, capsys, text):
    if text is not None:
        (tmp_path / "run.toml").write_text(text)
    assert command.main([str(tmp_path / "run.toml"), "--toy-size", "0"]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    head, problem = said.err.splitlines()
    assert head == "miles check: 1 problem"
    assert "there is no run file" in problem or "is not TOML" in problem
