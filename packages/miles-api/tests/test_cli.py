"""`miles hooks list | show | new | check`: what an author sees, and what scripts can rely on."""

import copy
import importlib
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from miles_api.cli import main
from miles_api.cli.hooks import words
from miles_api.cli.hooks.scaffold import function_name
from miles_api.hooks import REGISTRY
from miles_api.record import DumpHeader, DumpWriter, RecordedGroup, RecordedRollout
from miles_api.sample import Sample

program = importlib.import_module("miles_api.cli.main")

BAD = """\
def reward(args, sample):
    return helper(sample)

def helper(sample):
    return sample.metadata["answer"] * args_weight
args_weight = 1.0

async def weighted(args, sample):
    return args.rollout_temperature if args.rollout_stop == ["x"] else float("nan")

def one(sample):
    return 1.0

def upload(args, rollout_id, checkpoint_dir, hf_checkpoint_dir):
    raise RuntimeError("was called")

def anything(*args, **kwargs):
    return 1.0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(BAD)
    return tmp_path


@pytest.fixture
def miles(capsys):
    """Run `miles hooks …`; return exit code, output and errors."""

    def run(*words):
        code = main(["hooks", *words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


# list and show


def test_list_has_one_line_a_hook_with_its_flag(miles):
    code, out, _ = miles("list")
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == len(REGISTRY)
    for spec in REGISTRY.values():
        assert any(f" {spec.name} " in line and (spec.flag or "") in line for line in lines)


def test_list_says_which_package_is_missing_to_call_a_hook(miles, monkeypatch):
    monkeypatch.setattr(words, "entry_points", lambda group: {})
    _, out, _ = miles("list")
    assert all("needs miles-" in line for line in out.splitlines())
    _, out, _ = miles("list", "--json")
    rows = {row["hook"]: row for row in json.loads(out)}
    assert (rows["reward"]["called_by"], rows["reward"]["missing"]) == (None, "miles-rollout")
    assert rows["loss"]["missing"] == "miles-train"
    _, out, _ = miles("show", "reward")
    assert "nothing installed: needs miles-rollout to run" in out


@pytest.mark.parametrize("name", REGISTRY)
def test_show_prints_signature_docs_and_facts_once_each(miles, name):
    spec = REGISTRY[name]
    code, out, _ = miles("show", name)
    assert code == 0
    assert "NotImplementedError" not in out
    assert "@hook" not in out
    assert out.count(spec.doc.splitlines()[0]) == 1
    for title in ("runs ", "since ", "default ", "called by ", "short names "):
        assert sum(line.startswith(title) for line in out.splitlines()) == 1, title
    if spec.kind == "function":
        assert out.count(f"def {name}(") == sum(not isinstance(form.stub, type) for form in spec.forms)


def test_show_gives_the_same_facts_as_json(miles):
    code, out, _ = miles("show", "reward", "--json")
    page = json.loads(out)
    assert code == 0
    assert page["flag"] == "--custom-rm-path"
    form = page["forms"][0]
    assert form["signature"] == "async def reward(args: Args, sample: Sample, /) -> float | dict[str, float]"
    assert [p["name"] for p in form["parameters"]] == ["args", "sample"]
    assert page["moment"] == "rollout"
    assert page["since"] == "1.0"


def test_a_name_that_is_no_hook_is_refused_with_the_nearest(miles):
    for action in (["show", "rewrad"], ["new", "rewrad"], ["check", "a:b", "--as", "rewrad"]):
        code, _, err = miles(*action)
        assert code == 2
        assert "did you mean 'reward'" in err


# new


@pytest.mark.parametrize("name", REGISTRY)
def test_every_new_hook_loads_fits_and_behaves(miles, folder, name):
    spec = REGISTRY[name]
    code, out, _ = miles("new", name)
    assert code == 0
    reference = f"my_{name}.py:{function_name(spec)}"
    assert f"miles hooks check {reference} --as {name}" in out
    if spec.flag is not None:
        assert f"{spec.flag} {reference}" in out
        assert (spec.needs or "") in out
    code, out, err = miles("check", reference, "--as", name)
    assert code == 0, err
    # A Megatron model is built on trainer ranks alone.
    if name != "model_provider":
        code, out, err = miles("check", reference, "--as", name, "--call", "--json")
        assert code == 0, err
        verdict = json.loads(out.splitlines()[-1])
        assert verdict["ok"]
        assert verdict.get("passed") or "torch" in verdict["note"]


@pytest.mark.parametrize("name", REGISTRY)
def test_every_new_hook_takes_the_stubs_parameters_in_its_colour(miles, folder, name):
    miles("new", name)
    source = (folder / f"my_{name}.py").read_text()
    spec = REGISTRY[name]
    if spec.kind == "function" and name != "generate":
        form = spec.forms[0]
        assert f"{'async def' if form.is_async else 'def'} {function_name(spec)}(" in source
        for parameter in form.signature.parameters:
            assert f"{parameter}: " in source
        assert spec.doc.splitlines()[0] in source
    compile(source, "scaffold", "exec")


def test_new_overwrites_nothing(miles, folder):
    (folder / "test_scores.py").write_text("# mine\n")
    code, _, err = miles("new", "reward", "--file", "scores.py")
    assert code == 2
    assert "test_scores.py exists already" in err
    assert not (folder / "scores.py").exists()
    assert (folder / "test_scores.py").read_text() == "# mine\n"


@pytest.mark.parametrize("file", ["scores.txt", "my-scores.py", "class.py"])
def test_new_refuses_what_is_no_name_of_a_module(miles, folder, file):
    code, _, err = miles("new", "reward", "--file", file)
    assert code == 2
    assert "name of a Python module" in err


def test_the_test_beside_a_new_hook_runs_with_strict_markers_and_importlib_mode(miles, folder):
    miles("new", "reward", "--file", "hooks/scores.py")
    words = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "--strict-markers", "--strict-config"]

    def run():
        return subprocess.run(
            [*words, "-p", "no:cacheprovider", "hooks"], capture_output=True, text=True, timeout=120, check=False,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )  # fmt: skip

    well = run()
    assert well.returncode == 0, well.stdout
    assert "1 passed" in well.stdout
    (folder / "hooks" / "scores.py").write_text("def reward(args, sample):\n    return None\n")
    broken = run()
    assert broken.returncode == 1
    assert "ConformanceError" in broken.stdout


# check


def test_a_hook_that_behaves_is_called_and_each_check_is_named(miles, folder):
    miles("new", "reward")
    code, out, _ = miles("check", "my_reward.py:reward", "--as", "reward")
    assert code == 0
    assert "fits the hook reward, --custom-rm-path" in out
    assert "ok  scores several samples at once" in out
    assert "not seen here: whether the scores are right" in out


def test_a_failed_check_exits_1_with_the_hooks_own_traceback(miles, folder):
    code, _, err = miles("check", "mine.py:reward", "--as", "reward")
    assert code == 1
    assert "raised KeyError: 'answer'" in err
    assert "line 5, in helper" in err
    assert "miles_api" not in err.partition("KeyError")[0]


def test_options_and_samples_of_ones_own_are_given_to_the_hook(miles, folder):
    (folder / "samples.jsonl").write_text('{"prompt": "a", "response": "b", "metadata": {"answer": 2}}\n\n')
    assert miles("check", "mine.py:reward", "--as", "reward", "--samples", "samples.jsonl")[0] == 0
    assert miles("check", "mine.py:weighted", "--as", "reward")[0] == 1
    settings = ["--set", 'rollout-stop=["x"]', "--set", "rollout_temperature=0.5", "--set", "rm_type=text"]
    assert miles("check", "mine.py:weighted", "--as", "reward", *settings)[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mine.py:nothing", "--as", "reward"], "has no 'nothing'"),
        (["mine.py:one", "--as", "reward"], "miles calls: reward(args, sample, /)"),
        (["mine.py:weighted", "--as", "loss"], "does not fit"),
        (["mine.py:weighted", "--as", "reward", "--set", "seed"], "expected KEY=VALUE"),
        (["mine.py:weighted", "--as", "reward", "--set", "sede=3"], "did you mean 'seed'"),
        (["mine.py:weighted", "--as", "reward", "--set", "seed=many"], "seed"),
        (["mine.py:weighted", "--as", "reward", "--samples", "no.jsonl"], "there is no such file"),
        (["mine.py:weighted", "--as", "reward", "--samples", "mine.py"], "line 1"),
    ],
)
def test_what_does_not_load_or_fit_or_was_asked_for_wrongly_exits_2(miles, folder, words, message):
    code, _, err = miles("check", *words)
    assert code == 2
    assert message in err


def test_the_samples_of_a_dump_are_given_to_the_hook(miles, folder):
    kept = Sample(prompt="a", response="b", metadata={"answer": 2})
    with DumpWriter("run.mdump", DumpHeader(config={})) as writer:
        writer.write(RecordedRollout(rollout_id=0, groups=[RecordedGroup([kept, [copy.copy(kept)]])]))
    code, _, err = miles("check", "mine.py:reward", "--as", "reward", "--samples", "run.mdump")
    assert (code, err) == (0, "")
    with DumpWriter("train.mdump", DumpHeader(kind="train", config={})):
        pass
    code, _, err = miles("check", "mine.py:reward", "--as", "reward", "--samples", "train.mdump")
    assert code == 2
    assert "no samples" in err


def test_samples_in_a_file_of_another_kind_are_refused_with_what_it_looks_like(miles, folder):
    (folder / "weights.pt").write_bytes(b"PK\x03\x04\xff\xfe\x00")
    code, _, err = miles("check", "mine.py:reward", "--as", "reward", "--samples", "weights.pt")
    assert code == 2
    assert "neither a dump nor JSON lines: it looks like a zip archive" in err


def test_a_key_that_is_nearly_a_field_of_a_sample_is_refused_and_another_is_an_attribute(miles, folder):
    (folder / "samples.jsonl").write_text('{"prompt": "a"}\n{"promt": "a", "response": "b"}\n')
    code, _, err = miles("check", "mine.py:anything", "--as", "reward", "--samples", "samples.jsonl")
    assert code == 2
    assert "line 2: 'promt' is no field of a Sample; did you mean 'prompt'" in err
    (folder / "samples.jsonl").write_text('{"prompt": "a", "verdict": 1, "extra": {"promt": 2}}\n')
    assert miles("check", "mine.py:anything", "--as", "reward", "--samples", "samples.jsonl")[0] == 0


@pytest.mark.parametrize("colour", ["def", "async def"])
def test_a_hook_that_exits_has_failed_by_name(miles, folder, colour):
    (folder / "exits.py").write_text(f"import sys\n{colour} reward(args, sample):\n    sys.exit(0)\n")
    code, _, err = miles("check", "exits.py:reward", "--as", "reward")
    assert code == 1
    assert "reward hook exits.py:reward: scores a finished sample: sample 0: called sys.exit(0)" in err


def test_a_file_that_exits_when_it_is_imported_is_refused_by_name(miles, folder):
    (folder / "script.py").write_text("import sys\ndef reward(args, sample): ...\nsys.exit(0)\n")
    code, _, err = miles("check", "script.py:reward", "--as", "reward")
    assert code == 2
    assert "script.py:reward does not import: SystemExit: 0" in err


def test_what_a_hook_prints_does_not_mix_with_the_verdict(miles, folder):
    (folder / "chatty.py").write_text("print('hello')\ndef reward(args, sample):\n    print('noise')\n    return 1.0\n")
    _, out, err = miles("check", "chatty.py:reward", "--as", "reward", "--json")
    assert json.loads(out)["ok"]
    assert "hello" in err
    assert "noise" in err


def test_a_dict_of_rewards_is_remarked_unless_a_key_picks_one(miles, folder):
    (folder / "several.py").write_text("def reward(args, sample):\n    return {'right': 1.0, 'length': 4.0}\n")
    code, out, _ = miles("check", "several.py:reward", "--as", "reward")
    assert code == 0
    assert "note: returns a dict: runs need --reward-key, one of length, right\n" in out
    assert "note" not in miles("check", "several.py:reward", "--as", "reward", "--set", "reward_key=right")[1]


def test_a_hook_that_acts_on_the_world_is_called_only_when_asked_to(miles, folder):
    code, out, _ = miles("check", "mine.py:upload", "--as", "post_save")
    assert code == 0
    assert "--call" in out
    assert miles("check", "mine.py:upload", "--as", "post_save", "--call")[0] == 1
    assert miles("check", "mine.py:reward", "--as", "reward", "--no-call")[0] == 0


def test_a_signature_that_says_nothing_is_remarked(miles, folder):
    code, out, _ = miles("check", "mine.py:anything", "--as", "reward")
    assert code == 0
    assert "its signature says nothing" in out


def test_a_hook_of_the_trainer_whose_package_is_not_here_is_not_wrong(miles, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    (folder / "on_ranks.py").write_text("import transformer_engine\n\ndef init(args): ...\n")
    code, out, _ = miles("check", "on_ranks.py:init", "--as", "megatron_init")
    assert code == 0
    assert "transformer_engine is not installed here" in out


@pytest.mark.parametrize(
    ("reference", "code", "said"),
    [
        ("mine.py:one", 2, {"ok": False, "fits": False, "called": False}),
        (
            "mine.py:reward",
            1,
            {"ok": False, "fits": True, "called": True, "check": "scores a finished sample", "sample": 0},
        ),
        ("mine.py:anything", 0, {"ok": True, "fits": True, "called": True}),
    ],
)
def test_json_says_the_same_as_the_exit_code(miles, folder, reference, code, said):
    found, out, _ = miles("check", reference, "--as", "reward", "--json")
    verdict = json.loads(out)
    assert found == code
    assert {key: verdict[key] for key in said} == said
    assert ("problem" in verdict) == (code != 0)


# the program itself


def test_a_reader_that_stops_early_sees_no_traceback():
    process = subprocess.Popen(
        [sys.executable, "-m", "miles_api.cli", "hooks", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(60) == 1


def test_a_pipe_that_breaks_elsewhere_is_not_hidden(monkeypatch):
    def broken(name, rest):
        raise BrokenPipeError("an engine's socket")

    monkeypatch.setattr(program, "_run", broken)
    with pytest.raises(BrokenPipeError, match="socket"):
        main(["hooks", "list"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("train", "needs miles-train (pip install miles-train[full])"),
        ("report", "needs miles-train (pip install miles-train[full])"),
        ("router", "needs miles-router (pip install miles-router)"),
        ("trian", "did you mean 'train'?"),
    ],
)
def test_a_command_of_a_package_that_is_not_installed_names_the_package(command, expected, monkeypatch, capsys):
    monkeypatch.setattr(program, "entry_points", lambda group: {"hooks": [], "check": [], "migrate": []})
    assert main([command, "run.toml"]) == 2
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "usage", "near"),
    [
        (["hooks", "check", "mine.py:one", "--jsn"], "usage: miles hooks check ", "flag --jsn; did you mean '--json'?"),
        (["hooks", "run", "a.py:f", "--lmit", "3"], "usage: miles hooks run ", "flag --lmit; did you mean '--limit'?"),
        (["migrate", "--strct"], "usage: miles migrate ", "flag --strct; did you mean '--strict'?"),
        (["migrate", "a.sh", "b.sh"], "usage: miles migrate ", "unexpected 'b.sh'"),
        (["hooks", "chek", "mine.py:one"], "usage: miles hooks ", "did you mean 'check'?"),
    ],
)  # fmt: skip
def test_a_word_that_a_command_does_not_know_is_named_with_its_usage_and_the_nearest(words, usage, near, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith(usage)
    assert near in err


def test_the_overview_puts_what_commands_do_into_one_column_however_long_their_names_are(monkeypatch, capsys):
    names = ("go", "retrieval-server")
    offered = {name: [SimpleNamespace(load=lambda: SimpleNamespace(help="does it"))] for name in names}
    monkeypatch.setattr(program, "entry_points", lambda group: offered)
    assert main(["--help"]) == 0
    assert "  go                does it\n  retrieval-server  does it\n" in capsys.readouterr().out
