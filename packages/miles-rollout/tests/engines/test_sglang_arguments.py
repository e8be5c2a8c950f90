"""Arguments for SGLang: the installed one judges them, before anything starts."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from miles_api.checks.check import check_words
from miles_api.config import RunConfig
from miles_api.errors import ServiceError
from miles_api.parsing.parse import parse_run
from miles_rollout.engines.local.options import LocalEngineOptions
from miles_rollout.engines.sglang.arguments import ask_arguments, find_sglang
from miles_rollout.engines.sglang.check import engine_notes, engine_problems
from miles_rollout.engines.sglang.options import SGLangOptions, interpreter

STAND_IN = str(Path(__file__).with_name("stand_in"))
SGLANG = ["--rollout-engine", "sglang"]


@pytest.fixture(autouse=True)
def imports(monkeypatch, tmp_path):
    """Let this Python have the stand-in as its SGLang; return the file that grows when it is imported."""
    monkeypatch.setenv("PYTHONPATH", STAND_IN)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("STAND_IN_IMPORTS", str(tmp_path / "imports"))
    find_sglang.cache_clear()
    yield tmp_path / "imports"
    find_sglang.cache_clear()


def problems(*words):
    return list(engine_problems(parse_run(words)))


def words_for(**given):
    verdict = ask_arguments(find_sglang(sys.executable), given)
    assert verdict.problems == {}
    return verdict.words


def test_every_mistake_is_named_with_what_sglang_says_and_what_was_meant(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[sglang]\ndtype = "fp64"\ncuda_graph_bs = [1, "x"]\n')
    found = problems(
        str(file), *SGLANG, "--sglang-mem-fraction-statik", "0.5", "--sglang-max-total-tokens", "many",
        "--sglang-disable-radix-cache", "yes", "--sglang-server-concurency=3", "--sglang-random-seed", "3",
        "--sglang-nccl-init-addr=a:1", "--sglang-model", "m", "--sglang-context-length", "--sglang-tp", "2",
    )  # fmt: skip
    assert len(found) == 11
    text = "\n".join(found)
    assert "--sglang-mem-fraction-statik 0.5: no argument of SGLang" in text
    assert "did you mean '--sglang-mem-fraction-static'?" in text
    assert "--sglang-max-total-tokens many: SGLang says: invalid int value: 'many'" in text
    assert "--sglang-disable-radix-cache yes: SGLang says: a switch, it takes no value" in text
    assert "did you mean '--sglang-server-concurrency'?" in text
    assert "--sglang-random-seed 3: not passed on: --seed sets it, another one for each engine" in text
    assert "--sglang-nccl-init-addr a:1: not passed on: the placement" in text
    assert "--sglang-model m: not passed on: --hf-checkpoint sets it" in text
    assert "--sglang-context-length: SGLang says: expected a value" in text
    assert "; it has '--sglang-tp-size'" in text
    assert "run.toml [sglang] dtype (--sglang-dtype fp64): SGLang says: invalid choice: 'fp64'" in text
    assert 'run.toml [sglang] cuda_graph_bs (--sglang-cuda-graph-bs [1,"x"]): SGLang says: invalid int value' in text


def test_what_is_accepted_becomes_the_words_that_mean_the_same():
    assert words_for(mem_fraction_static=0.25) == ["--mem-fraction-static", "0.25"]
    assert words_for(cuda_graph_bs=[1, 2]) == ["--cuda-graph-bs", "1", "2"]
    assert words_for(disable_radix_cache=True) == ["--disable-radix-cache"]
    assert words_for(disable_radix_cache=False) == []
    assert words_for(schedule_conservatively=False) == ["--no-schedule-conservatively"]
    assert words_for(json_model_override_args={"a": [1]}) == ["--json-model-override-args", '{"a": [1]}']
    assert words_for(max_total_tokens=-1) == ["--max-total-tokens=-1"]


@pytest.mark.parametrize("value", [[1, "--host", "0.0.0.0"], [1, "--host=0.0.0.0"], ["-1", "--disable-radix-cache"]])
def test_no_value_can_smuggle_in_an_argument_of_its_own(value):
    verdict = ask_arguments(find_sglang(sys.executable), {"cuda_graph_bs": value})
    assert verdict.words == []
    assert "is an argument of its own, and no value of this one" in verdict.problems["cuda_graph_bs"]
    assert words_for(cuda_graph_bs=[1, -2]) == ["--cuda-graph-bs", "1", "-2"]


def test_a_date_in_a_run_file_is_the_word_that_stood_there(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[sglang]\nmem_fraction_static = 2020-01-01\n")
    (found,) = problems(str(file), *SGLANG)
    assert "invalid float value: '2020-01-01'" in found


def test_a_judgement_is_not_kept_when_something_is_installed_beside_sglang_or_the_file_is_damaged(
    imports, monkeypatch, tmp_path
):
    shutil.copytree(STAND_IN, tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    words = [*SGLANG, "--sglang-dtype", "half"]
    assert problems(*words) == []
    (kept,) = (tmp_path / "cache/miles").iterdir()
    kept.write_text("{}")
    assert problems(*words) == []
    assert imports.read_text().count("imported") == 2
    (tmp_path / "packages/sglang_plugin").mkdir()
    assert problems(*words) == []
    assert imports.read_text().count("imported") == 3


def test_sglang_is_imported_once_for_the_same_arguments_and_not_at_all_for_none(imports):
    assert problems(*SGLANG) == []
    assert not imports.exists()
    for _ in range(2):
        find_sglang.cache_clear()  # as another process would
        assert problems(*SGLANG, "--sglang-dtype", "half") == []
        assert imports.read_text().count("imported") == 1
    problems(*SGLANG, "--sglang-dtype", "auto")
    assert imports.read_text().count("imported") == 2


def test_a_missing_or_broken_sglang_is_named_with_the_way_out(monkeypatch, tmp_path):
    monkeypatch.setenv("STAND_IN_BROKEN", "1")
    (broken,) = problems(*SGLANG, "--sglang-dtype", "half")
    assert "cannot be imported" in broken
    assert "libcudart.so.13: cannot open shared object file" in broken
    monkeypatch.delenv("PYTHONPATH")
    find_sglang.cache_clear()
    (missing,) = problems(*SGLANG)
    assert f"{sys.executable} (Python" in missing
    assert ") has no SGLang" in missing
    assert "--sglang-python" in missing
    (nowhere,) = problems(*SGLANG, "--sglang-python", str(tmp_path / "python"))
    assert f"{tmp_path / 'python'} cannot be run" in nowhere
    with pytest.raises(ServiceError, match="is no Python"):
        find_sglang("/bin/echo")


def test_a_virtual_environments_python_is_not_resolved_to_the_one_it_links_to(tmp_path):
    link = tmp_path / "bin" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    assert interpreter(SGLangOptions(sglang_python=str(link))) == str(link)
    assert interpreter(SGLangOptions()) == sys.executable


def test_options_that_the_chosen_engine_does_not_have_are_said_to_be_unused():
    local = ["--engine-max-total-len", "32", "--engine-impl", "lean"]
    (note,) = engine_notes(parse_run([*SGLANG, *local]))
    assert "--engine-max-total-len (SGLang's is --sglang-context-length), --engine-impl" in note
    (note,) = engine_notes(parse_run(["--sglang-dtype", "half", "--sglang-python", "p"]))
    assert note == "rollout_engine local: not used, nor checked: --sglang-dtype, --sglang-python"
    assert engine_notes(parse_run(local)) == []
    assert engine_notes(parse_run([*SGLANG, "--sglang-dtype", "half", "--engine-host", "::1"])) == []
    assert (
        "--engine-host"
        in engine_notes(parse_run([*SGLANG, "--rollout-engine-urls", "http://a:1", "--engine-host", "::1"]))[0]
    )


def test_a_deterministic_run_is_refused_with_the_reason():
    (problem,) = problems(*SGLANG, "--deterministic")
    assert "--deterministic needs --rollout-engine local" in problem
    assert "in the batch" in problem


def test_a_response_has_to_fit_into_the_context_that_sglang_is_given():
    words = [*SGLANG, "--sglang-context-length", "64", "--rollout-max-response-len", "64"]
    report = check_words(words, prog="miles check")
    assert any("leaves no room for a prompt: the engine holds 64 tokens" in p.message for p in report.problems)
    # The local engine's limit is another engine's.
    words = [*SGLANG, "--engine-max-total-len", "64", "--rollout-max-response-len", "64"]
    report = check_words(words, prog="miles check")
    assert not any("leaves no room" in p.message for p in report.problems)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--rollout-engine-urls", "http://a:1"], "needs --rollout-engine sglang"),
        ([*SGLANG, "--rollout-engine-urls", "a:1"], "'a:1' is not of the form http://host:port"),
        ([*SGLANG, "--rollout-engine-urls", "http://a"], "'http://a' is not of the form http://host:port"),
        ([*SGLANG, "--rollout-engine-urls", "https://a:1"], "'https://a:1' is not of the form http://host:port"),
        ([*SGLANG, "--rollout-engine-urls", "http://a:1,http://a:1/"], "names an engine twice"),
        ([*SGLANG, "--rollout-engine-urls", "http://a:1", "--rollout-num-engines", "2"], "names 1: drop it"),
        ([*SGLANG, "--rollout-engine-urls", "http://a:1", "--sglang-dtype", "half"], "run already, with arguments of"),
    ],
)
def test_attaching_is_checked_without_asking_anybody(words, expected):
    report = check_words(words, prog="miles check")
    assert any(expected in problem.message for problem in report.problems), report.problems


def test_the_number_of_attached_engines_follows_from_their_addresses():
    report = check_words([*SGLANG, "--rollout-engine-urls", "http://a:1, http://b:2/"], prog="miles check")
    assert report.config is not None
    assert report.config.flat()["rollout_num_engines"] == 2
    assert not any("engines" in problem.message for problem in report.problems)


def test_a_run_of_the_local_engine_asks_for_no_sglang(monkeypatch):
    monkeypatch.delenv("PYTHONPATH")
    assert list(engine_problems(RunConfig.of(LocalEngineOptions()))) == []
