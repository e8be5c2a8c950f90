"""`miles hooks list | show | new | check`: what an author sees, and what scripts can rely on."""

import json
import os
import subprocess
import sys

import pytest

from miles_api.cli import main
from miles_api.cli.hooks import words
from miles_api.cli.hooks.scaffold import function_name
from miles_api.hooks import REGISTRY

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
