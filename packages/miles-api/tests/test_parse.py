import math
import sys
import tomllib
from typing import Annotated

import msgspec
import pytest

from miles_api import config as config_module
from miles_api.errors import ConfigError
from miles_api.hook_options import HookOptions
from miles_api.options import ForeignOptions, Options, UserPath
from miles_api.parsing import parse
from miles_api.run_options import RunOptions


class ToyOptions(Options, frozen=True, kw_only=True):
    """A group of a package."""

    toy_size: Annotated[int, msgspec.Meta(ge=1)] = 3
    """How large."""
    toy_names: list[str] | None = None
    toy_file: UserPath | None = None
    toy_on: bool = False
    toy_extra: dict[str, int] = {}
    toy_maybe: bool | None = None
    toy_weight: float = 1.0
    toy_bound: float | None = 0.5


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    chosen = {"run": RunOptions, "hooks": HookOptions, "toy": ToyOptions}
    monkeypatch.setattr(parse, "option_groups", lambda: chosen)
    monkeypatch.setattr(config_module, "option_groups", lambda: chosen)


@pytest.fixture
def run_file(tmp_path):
    def write(text):
        file = tmp_path / "run.toml"
        file.write_text(text)
        return str(file)

    return write


def problems(argv):
    with pytest.raises(ConfigError) as error:
        parse.parse_run(argv)
    return str(error.value)


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(run_file):
    config = parse.parse_run([run_file("[toy]\ntoy_size = 5\n[run]\nseed = 7\n"), "--toy-size", "9"])
    assert config.group(ToyOptions).toy_size == 9
    assert config.group(RunOptions).seed == 7
    assert config.args.num_rollout == RunOptions().num_rollout
    assert config.sources == {"toy_size": "command line", "seed": "run.toml"}


def test_an_object_on_the_command_line_that_is_no_json_is_told_how_one_is_written():
    said = problems(["--toy-extra", "x=1"])
    assert "--toy-extra = 'x=1': Expected an object in JSON" in said
    assert """'{"name": 1}'""" in said


def test_all_problems_come_in_one_report_with_the_nearest_names(run_file):
    text = problems(
        [run_file('[toy]\ntoy_sise = 1\ntoy_on = "yes"\n[rum]\nx = 1\n[run]\ntoy_size = 2\n'), "--toy-sze", "4",
         "--loss-type", "sft", "--num-rollout", "0"]
    )  # fmt: skip
    for expected in (
        "unknown flag --toy-sze; did you mean '--toy-size'?",
        "run.toml [toy]: unknown key 'toy_sise'; did you mean 'toy_size'?",
        "unknown table [rum]; did you mean 'run'?",
        "run.toml [run]: toy_size belongs in [toy]",
        "toy_on = 'yes': Expected `bool`, got a quoted string",
        "--loss-type = 'sft': Invalid enum value 'sft'; choose from policy_loss",
        "--num-rollout = '0': Expected `int` >= 1",
    ):
        assert expected in text


def test_a_relative_path_in_a_file_is_looked_up_beside_that_file(run_file, tmp_path):
    (tmp_path / "data.jsonl").touch()
    config = parse.parse_run([run_file('[toy]\ntoy_file = "data.jsonl"\n[run]\nrun_dir = "out"\n')])
    assert config.group(ToyOptions).toy_file == str(tmp_path / "data.jsonl")
    assert config.group(RunOptions).run_dir == str(tmp_path / "out")


def test_a_name_that_is_no_file_stays_a_name_of_a_model_hub(run_file):
    config = parse.parse_run([run_file('[run]\nhf_checkpoint = "Qwen/Qwen3-0.6B"\n')])
    assert config.args.hf_checkpoint == "Qwen/Qwen3-0.6B"


def test_lists_booleans_and_tables_read_from_the_command_line():
    words = ["--toy-names", "a", "--toy-names", "b", "--toy-on", "--toy-extra", '{"x": 1}']
    toy = parse.parse_run(words).group(ToyOptions)
    assert (toy.toy_names, toy.toy_on, toy.toy_extra) == (["a", "b"], True, {"x": 1})
    assert parse.parse_run(["--no-toy-on"]).group(ToyOptions).toy_on is False


def test_the_resolved_config_reads_back_as_itself(run_file, tmp_path):
    first = parse.parse_run(["--toy-extra", '{"x y": 1}', "--toy-names", 'quo"te', "--toy-names", "ü", "--seed", "5"])
    text = first.to_toml()
    assert 'toy_names = ["quo\\"te", "ü"]  # command line' in text
    tomllib.loads(text)
    again = parse.parse_run([run_file(text)])
    assert again.flat() == first.flat()


def test_a_hook_brings_options_of_its_own(run_file, tmp_path):
    (tmp_path / "opt_reward.py").write_text(
        "import msgspec\n"
        "class Scale(msgspec.Struct, frozen=True):\n    reward_scale: float = 1.0\n"
        "def score(args, sample):\n    return args.reward_scale\n"
        "score.options = Scale\n"
    )
    file = run_file('[hooks]\ncustom_rm_path = "opt_reward.py:score"\n[hooks.reward]\nreward_scale = 2.5\n')
    assert parse.parse_run([file]).args.reward_scale == 2.5
    assert parse.parse_run([file, "--reward-scale", "4"]).args.reward_scale == 4.0
    assert "no configured hook takes options [hooks.reward]" in problems(
        [run_file("[hooks.reward]\nreward_scale = 2.5\n")]
    )


def test_a_hook_that_does_not_import_is_found_while_parsing(run_file):
    assert "there is no file" in problems([run_file('[hooks]\ncustom_rm_path = "nowhere.py:score"\n')])


def test_several_references_are_a_list_and_one_stays_a_string():
    one = parse.parse_run(["--dynamic-sampling-filter-path", "json:dumps"])
    two = parse.parse_run(["--dynamic-sampling-filter-path", "json:dumps,json:loads"])
    assert one.args.dynamic_sampling_filter_path == "json:dumps"
    assert two.args.dynamic_sampling_filter_path == ["json:dumps", "json:loads"]
    assert "takes one reference" in problems(["--custom-rm-path", "json:dumps,json:loads"])


def test_the_same_reference_twice_is_an_error(run_file):
    assert "names json:dumps twice" in problems(["--dynamic-sampling-filter-path", "json:dumps,json:loads,json:dumps"])
    file = run_file('[hooks]\nrollout_sample_filter_path = ["json:dumps", "json:dumps"]\n')
    assert "run.toml: rollout_sample_filter_path" in problems([file])
    one = run_file('[hooks]\nrollout_sample_filter_path = ["json:dumps"]\n')
    assert parse.parse_run([one]).args.rollout_sample_filter_path == "json:dumps"


def test_the_run_file_may_come_after_flags(run_file):
    assert parse.parse_run(["--toy-size", "5", run_file("[run]\nseed = 9\n"), "--toy-on"]).args.seed == 9


def test_a_run_file_that_is_not_toml_or_not_there_is_named(run_file):
    assert "is not TOML" in problems([run_file("a = \n")])
    text = problems(["--toy-sise", "3", "nowhere.toml"])
    assert "did you mean '--toy-size'" in text
    assert "there is no run file" in text


def test_a_list_flag_takes_one_word_and_leaves_the_run_file_alone(run_file):
    config = parse.parse_run(["--toy-names", "a", run_file("[run]\nseed = 9\n")])
    assert (config.args.toy_names, config.args.seed) == (["a"], 9)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("[hooks]\ndynamic_sampling_filter_path = [1]", "Expected `str`"), ("[toy]\ntoy_on = 1", "Expected `bool`")],
)
def test_a_value_of_the_wrong_kind_in_a_file_is_named(run_file, text, expected):
    assert expected in problems([run_file(text)])


def test_a_derived_value_is_written_as_a_comment(run_file):
    config = parse.parse_run(["--seed", "5"]).replace(rollout_batch_size=4)
    assert "# rollout_batch_size = 4 follows from the others" in config.to_toml()
    assert parse.parse_run([run_file(config.to_toml())]).args.rollout_batch_size is None


def test_field_docs_become_help():
    import argparse

    parser = argparse.ArgumentParser()
    parse.add_option_flags(parser, {"toy": ToyOptions})
    if sys.flags.optimize < 2:
        assert "How large. (default: 3)" in parser.format_help()


def test_a_secret_is_never_written_to_the_config(monkeypatch):
    secret = Annotated[str, msgspec.Meta(extra={"secret": True})]
    kind = msgspec.defstruct("Secretive", [("door_key", secret | None, None)], bases=(Options,), frozen=True)
    monkeypatch.setattr(parse, "option_groups", lambda: {"run": RunOptions, "hooks": HookOptions, "door": kind})
    config = parse.parse_run(["--door-key", "sesame"])
    assert config.args.door_key == "sesame"
    assert "sesame" not in config.to_toml()
    assert "door_key" not in config.public()


def test_a_number_that_is_not_finite_reads_back_from_the_resolved_config():
    numbers = {"a": math.inf, "b": [-math.inf], "c": {"d": math.nan}}
    text = config_module.RunConfig({}, {}, {"reward": config_module.HookValues(numbers)}).to_toml()
    assert str(tomllib.loads(text)["hooks"]["reward"]) == str(numbers)


def test_null_unsets_an_optional_path_switch_or_number(run_file, tmp_path):
    (tmp_path / "null").touch()
    text = "[toy]\ntoy_file = {}\ntoy_maybe = {}\ntoy_bound = {}\n"
    unset = {"toy_file": None, "toy_maybe": None, "toy_bound": None}
    again = parse.parse_run([run_file(text.format(*['"null"'] * 3))])
    assert again.flat().items() >= unset.items()
    assert parse.parse_run([run_file(again.to_toml())]).flat() == again.flat()
    here = run_file(text.format('"run.toml"', "true", "0.25"))
    words = [here, "--toy-file", "null", "--toy-bound", "null", "--toy-maybe=null"]
    assert parse.parse_run(words).flat().items() >= unset.items()
    assert parse.parse_run([*words, "--toy-maybe"]).flat()["toy_maybe"] is True
    assert "ignored explicit argument 'null'" in problems(["--toy-on=null"])
    assert "toy_on = 'null': Expected `bool`" in problems([run_file('[toy]\ntoy_on = "null"\n')])


def test_an_empty_path_is_no_path(run_file):
    assert "--toy-file = '': Expected a path" in problems(["--toy-file", ""])
    assert "run.toml: run_dir = ' ': Expected a path" in problems([run_file('[run]\nrun_dir = " "\n')])


@pytest.mark.parametrize("word", ["inf", "-inf", "nan", "1e999"])
def test_a_number_that_is_not_finite_is_refused(run_file, word):
    text = problems([f"--toy-weight={word}", f"--toy-bound={word}"])
    assert f"--toy-weight = {word!r}: " in text
    assert f"--toy-bound = {word!r}: " in text
    in_file = problems([run_file(f"[toy]\ntoy_weight = {word}\n")])
    assert "run.toml: toy_weight" in in_file
    assert "Expected a finite number" in in_file


def test_a_default_that_is_not_finite_reads_back(run_file, tmp_path):
    (tmp_path / "bounded.py").write_text(
        "import math\n"
        "import msgspec\n"
        "class Bounds(msgspec.Struct, frozen=True):\n    reward_most: float = math.inf\n"
        "def score(args, sample):\n    return 0.0\n"
        "score.options = Bounds\n"
    )
    config = parse.parse_run([run_file('[hooks]\ncustom_rm_path = "bounded.py:score"\n')])
    assert parse.parse_run([run_file(config.to_toml())]).args.reward_most == math.inf


class OtherOptions(Options, frozen=True, kw_only=True):
    """How another program is started."""

    other_python: str | None = None
    other_size: int = 1
    other_args: ForeignOptions = {}
    """Any option of the other program."""


@pytest.fixture
def other(monkeypatch):
    chosen = {"run": RunOptions, "hooks": HookOptions, "toy": ToyOptions, "other": OtherOptions}
    monkeypatch.setattr(parse, "option_groups", lambda: chosen)
    monkeypatch.setattr(config_module, "option_groups", lambda: chosen)


def test_options_of_another_program_are_taken_as_they_stand_from_flags_and_file(other, run_file):
    file = run_file('[other]\nother_python = "p"\ndtype = "half"\nmem-share = 0.5\ndebug = true\nseed = 3\n')
    words = ["--other-mem-share", "0.25", "--other-names", "a", "-1", "1e-05", "007", file, "--other-size=2"]
    config = parse.parse_run([*words, "--seed", "5", "--other-on", "--other-json={}", "--toy-size", "4"])
    options = config.group(OtherOptions)
    assert (options.other_python, options.other_size, config.group(ToyOptions).toy_size) == ("p", 2, 4)
    assert config.group(RunOptions).seed == 5
    assert options.other_args == {
        "dtype": "half",
        "mem_share": 0.25,
        "debug": True,
        "seed": 3,
        "names": ["a", -1, 1e-05, "007"],
        "on": True,
        "json": "{}",
    }
    assert config.args.other_mem_share == 0.25
    assert (config.sources["other_mem_share"], config.sources["other_dtype"]) == ("command line", "run.toml")


def test_the_written_config_gives_another_program_the_same_options_and_says_whence(other, run_file, tmp_path):
    file = run_file('[other]\ndtype = "half"\n')
    config = parse.parse_run(
        [file, "--other-on", "--other-names", "a", "7", "--other-share", "0.5", "--other-odd", "1.50"]
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert 'dtype = "half"  # run.toml\n' in config.to_toml()
    assert "share = 0.5  # command line\n" in config.to_toml()
    again = parse.parse_run([str(tmp_path / "config.toml")])
    assert again.group(OtherOptions) == config.group(OtherOptions)
    assert config.public()["other_args"] == {
        "dtype": "half",
        "on": True,
        "names": ["a", 7],
        "share": 0.5,
        "odd": "1.50",
    }


def test_an_option_of_ours_stays_ours_beside_those_of_another_program(other, run_file):
    text = problems([run_file("[other]\nsize = 3\n"), "--other-size", "many"])
    assert "run.toml [other]: unknown key 'size'; did you mean" in text
    assert "--other-size = 'many'" in text
