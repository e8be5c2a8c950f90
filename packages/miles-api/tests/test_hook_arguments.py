import pickle
import subprocess
import sys
import tomllib

import pytest

from miles_api import config as config_module
from miles_api.errors import ConfigError
from miles_api.hook_options import HookOptions
from miles_api.options import Options
from miles_api.parsing import parse
from miles_api.run_options import RunOptions


class ToyOptions(Options, frozen=True, kw_only=True):
    """A group of a package."""

    toy_size: int = 3
    toy_on: bool = False


@pytest.fixture(autouse=True)
def groups(monkeypatch):
    chosen = {"run": RunOptions, "hooks": HookOptions, "toy": ToyOptions}
    monkeypatch.setattr(parse, "option_groups", lambda: chosen)
    monkeypatch.setattr(config_module, "option_groups", lambda: chosen)


@pytest.fixture
def write(tmp_path):
    def write(name, text):
        file = tmp_path / name
        file.write_text(text)
        return str(file)

    return write


@pytest.fixture
def hook(write):
    """Write a reward with `add_arguments` made of these lines, and return the words that configure it."""

    def make(*lines, name="mine.py", flag="--custom-rm-path"):
        body = "".join(f"    {line}\n" for line in lines)
        text = f"import argparse, pathlib\ndef fn(args, sample): ...\ndef add(parser):\n{body}    return parser\n"
        return [flag, write(name, f"{text}fn.add_arguments = add\n") + ":fn"]

    return make


SCALE = "parser.add_argument('--scale', type=float, default=1.0, help='How much.')"


def problems(argv):
    with pytest.raises(ConfigError) as error:
        parse.parse_run(argv)
    return str(error.value)


def test_options_of_a_hooks_add_arguments_are_on_args_with_the_command_line_over_the_file_over_the_default(hook, write):
    words = hook(SCALE)
    file = write("run.toml", "[hooks.reward]\nscale = 2.5\n")
    assert parse.parse_run(words).args.scale == 1.0
    assert parse.parse_run([file, *words]).args.scale == 2.5
    assert parse.parse_run([file, *words, "--scale", "4"]).args.scale == 4.0


def test_where_a_hooks_option_came_from_is_in_the_resolved_config_which_reads_back(hook, write):
    words = hook(
        SCALE,
        "parser.add_argument('--names', nargs='*', default=['a'])",
        "parser.add_argument('--none')",
        "parser.add_argument('--where', type=pathlib.Path, default=pathlib.Path('here'))",
    )
    first = parse.parse_run([*words, "--scale", "4"])
    text = first.to_toml()
    assert "scale = 4.0  # command line" in text
    assert tomllib.loads(text)["hooks"]["reward"] == {"scale": 4.0, "names": ["a"], "where": "here"}
    assert first.sources["scale"] == "command line"
    again = parse.parse_run([write("config.toml", text)])
    assert again.flat() == first.flat()
    assert again.sources["scale"] == "config.toml"


def test_a_default_without_a_flag_and_one_outside_the_choices_read_back_from_the_resolved_config(hook, write):
    words = hook("parser.set_defaults(hidden=5)", "parser.add_argument('--odd', choices=['a'], default='none')")
    first = parse.parse_run(words)
    assert not {"hidden", "odd"} & set(first.sources)
    assert parse.parse_run([write("config.toml", first.to_toml())]).flat() == first.flat()
    assert parse.parse_run([*words, write("run.toml", "[hooks.reward]\nhidden = 6\n")]).args.hidden == 6


def test_a_hook_named_in_the_file_brings_options_for_the_command_line(hook, write):
    _, reference = hook(SCALE)
    file = write("run.toml", f'[hooks]\ncustom_rm_path = "{reference}"\n')
    assert parse.parse_run([file, "--scale", "3"]).args.scale == 3.0
    assert parse.parse_run(["--scale", "3", file]).args.scale == 3.0
    other_name = write("run.conf", f'[hooks]\ncustom_rm_path = "{reference}"\n')
    assert parse.parse_run([other_name, "--scale", "3"]).args.scale == 3.0
    above = write("above.toml", f'custom_rm_path = "{reference}"\n')
    assert parse.parse_run([above, "--scale", "3"]).args.scale == 3.0


def test_every_kind_of_argument_reads_from_both_sides(hook, write):
    words = hook(
        "parser.add_argument('--count', type=int, default='7')",
        "parser.add_argument('--deep', action='store_true')",
        "parser.add_argument('--shallow', action='store_false')",
        "parser.add_argument('--quick', action=argparse.BooleanOptionalAction, default=True)",
        "parser.add_argument('--kind', choices=['a', 'b'])",
        "parser.add_argument('--tag', action='append')",
        "parser.add_argument('--pair', nargs=2, type=int)",
        "parser.add_argument('--where', type=pathlib.Path)",
        "parser.set_defaults(hidden=5)",
    )
    default = {"count": 7, "deep": False, "shallow": True, "quick": True, "kind": None, "tag": None, "hidden": 5}
    config = parse.parse_run(words)
    assert {name: config.flat()[name] for name in default} == default
    flags = [
        "--count",
        "8",
        "--deep",
        "--shallow",
        "--no-quick",
        "--kind",
        "b",
        "--tag",
        "x",
        "--tag",
        "y",
        "--pair",
        "1",
        "2",
        "--where",
        "there",
    ]
    by_flag = parse.parse_run([*words, *flags]).flat()
    table = 'count = 8\ndeep = true\nshallow = false\nquick = false\nkind = "b"\ntag = ["x", "y"]\npair = [1, 2]\n'
    file = write("run.toml", f'[hooks.reward]\n{table}where = "there"\n')
    by_file = parse.parse_run([*words, file]).flat()
    names = [*default, "pair", "where"]
    assert {name: by_flag[name] for name in names} == {name: by_file[name] for name in names}
    assert by_flag["pair"] == [1, 2]
    assert by_flag["where"].name == "there"


@pytest.mark.parametrize(
    ("line", "toml", "expected"),
    [
        ("parser.add_argument('--x', type=int)", 'x = "5"', "x = '5': Expected `int`, got a quoted string"),
        ("parser.add_argument('--x', type=int)", "x = 5.5", "x = 5.5: Expected `int`"),
        ("parser.add_argument('--x', type=int)", "x = [5]", "Expected one value, got a list"),
        ("parser.add_argument('--x')", "x = 5", "Expected `str`, got `int`"),
        ("parser.add_argument('--x', choices=['a'])", 'x = "b"', "choose from a"),
        ("parser.add_argument('--x', nargs='+')", 'x = "b"', "Expected a list"),
        ("parser.add_argument('--x', action='store_true')", "x = 1", "Expected `bool`, got `int`"),
        ("parser.add_argument('--x', required=True)", "", "--x is not set, and the reward hook"),
    ],
)
def test_a_value_that_does_not_fit_a_hooks_argument_is_named(hook, write, line, toml, expected):
    file = write("run.toml", f"[hooks.reward]\n{toml}\n")
    assert expected in problems([*hook(line), file])


def test_a_required_option_may_come_from_the_file(hook, write):
    words = hook(
        "parser.add_argument('--x', required=True)",
        "either = parser.add_mutually_exclusive_group(required=True)",
        "either.add_argument('--left')",
        "either.add_argument('--right')",
    )
    file = write("run.toml", '[hooks.reward]\nx = "1"\nleft = "l"\n')
    config = parse.parse_run([file, *words])
    assert (config.args.x, config.args.left, config.args.right) == ("1", "l", None)
    assert "--left or --right is not set" in problems([*words, "--x", "1"])
    assert "not allowed with argument" in problems([*words, "--left", "1", "--right", "2"])


@pytest.mark.parametrize("line", ["parser.add_argument('--toy-size')", "parser.add_argument('--no-toy-on', dest='a')"])
def test_an_option_that_the_framework_has_names_both_owners(hook, line):
    text = problems(hook(line))
    flag = line.split("'")[1]
    assert f"{flag} is brought by the reward hook" in text
    assert "and the option group [toy] of" in text
    assert "has it too" in text


def test_two_hooks_with_the_same_option_are_both_named(hook):
    first, second = hook(SCALE), hook(SCALE, name="other.py", flag="--buffer-filter-path")
    text = problems([*first, *second])
    assert "--scale is brought by the reward hook" in text or "--scale is brought by the buffer_filter hook" in text
    assert "mine.py:fn" in text
    assert "other.py:fn" in text


def test_each_hook_of_a_list_may_bring_options_to_the_same_table(hook, write):
    flag, first = hook(SCALE, flag="--dynamic-sampling-filter-path")
    _, second = hook("parser.add_argument('--least', type=int, default=1)", name="other.py")
    file = write("run.toml", "[hooks.dynamic_filter]\nscale = 2.0\nleast = 3\n")
    config = parse.parse_run([file, flag, f"{first},{second}"])
    assert (config.args.scale, config.args.least) == (2.0, 3)
    assert set(config.extra) == {"dynamic_filter"}
    assert parse.parse_run([write("again.toml", config.to_toml())]).flat() == config.flat()


def test_two_hooks_that_bring_the_very_same_options_have_them_once(write):
    reference = write(
        "mine.py",
        "import msgspec\nclass Both(msgspec.Struct, frozen=True):\n    scale: float = 1.0\n"
        "def a(args, sample): ...\ndef b(args, rollout_id, buffer, n): ...\na.options = b.options = Both\n",
    )
    words = ["--custom-rm-path", f"{reference}:a", "--buffer-filter-path", f"{reference}:b"]
    for table in ("reward", "buffer_filter"):
        assert parse.parse_run([write("run.toml", f"[hooks.{table}]\nscale = 2.0\n"), *words]).args.scale == 2.0


def test_a_group_reward_has_its_options_under_its_own_name(hook, write):
    assert parse.parse_run([*hook(SCALE), write("run.toml", "[hooks.group_reward]\nscale = 2.0\n")]).args.scale == 2.0


def test_a_struct_may_require_a_value_and_hide_a_secret(write):
    reference = write(
        "mine.py",
        "import msgspec\nfrom typing import Annotated\nclass Needs(msgspec.Struct, frozen=True):\n"
        "    host: str\n    key: Annotated[str, msgspec.Meta(extra={'secret': True})] = ''\n"
        "def fn(args, sample): ...\nfn.options = Needs\n",
    )
    words = ["--custom-rm-path", f"{reference}:fn"]
    assert "--host is not set, and the reward hook" in problems(words)
    config = parse.parse_run([*words, "--host", "h", "--key", "sesame"])
    assert (config.args.host, config.args.key) == ("h", "sesame")
    assert "sesame" not in config.to_toml()
    assert "key" not in config.public()


def test_a_struct_that_refuses_its_values_says_so(write):
    reference = write(
        "mine.py",
        "import msgspec\nclass Odd(msgspec.Struct, frozen=True):\n    odd: int = 1\n"
        "    def __post_init__(self):\n        if self.odd % 2 == 0: raise ValueError('odd is even')\n"
        "def fn(args, sample): ...\nfn.options = Odd\n",
    )
    assert "mine.py:fn: odd is even" in problems(["--custom-rm-path", f"{reference}:fn", "--odd", "2"])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("parser.add_argument('place')", "adds 'place', which is not a --flag"),
        ("parser.add_argument('--a'); parser.add_argument('--a')", "its add_arguments raised ArgumentError"),
    ],
)
def test_add_arguments_that_cannot_be_used_names_the_hook(hook, line, expected):
    text = problems(hook(line))
    assert "the reward hook" in text
    assert expected in text


def test_an_attribute_options_that_is_no_struct_is_refused(write):
    reference = write("mine.py", "def fn(args, sample): ...\nfn.options = {'scale': 1}\n")
    assert "its `options` is {'scale': 1}, not a msgspec Struct class" in problems(
        ["--custom-rm-path", f"{reference}:fn"]
    )


def test_an_option_that_nobody_brings_is_still_unknown(hook):
    assert "unknown flag --scael; did you mean '--scale'?" in problems([*hook(SCALE), "--scael", "2"])


def test_a_config_with_options_of_a_file_reaches_a_process_that_has_not_loaded_the_file(hook, write):
    reference = write(
        "their.py",
        "import msgspec\nclass Own(msgspec.Struct, frozen=True):\n    power: int = 2\n"
        "def fn(args, r, b, n): ...\nfn.options = Own\n",
    )
    config = parse.parse_run([*hook(SCALE), "--buffer-filter-path", f"{reference}:fn", "--power", "3", "--scale", "2"])
    extra = pickle.dumps(config.extra)
    code = "import pickle, sys; print({k: v.values for k, v in pickle.loads(sys.stdin.buffer.read()).items()})"
    run = subprocess.run([sys.executable, "-c", code], input=extra, capture_output=True, check=True, timeout=30)
    assert run.stdout.decode().strip() == "{'buffer_filter': {'power': 3}, 'reward': {'scale': 2.0}}"


def test_a_trainer_hook_that_lacks_a_package_here_is_left_to_the_checks(write):
    reference = write("needs.py", "import megatron_that_is_not\ndef fn(args): ...\n")
    assert parse.parse_run(["--custom-megatron-init-path", f"{reference}:fn"]).args.custom_megatron_init_path
    assert "megatron_that_is_not" in problems(["--custom-rm-path", f"{reference}:fn"])


def test_checks_get_what_is_wrong_with_options_and_not_what_does_not_load(hook):
    found = []
    parse.parse_run(["--buffer-filter-path", "nowhere.fn", *hook("parser.add_argument('place')")], problems=found)
    assert len(found) == 1
    assert "which is not a --flag" in found[0]


@pytest.mark.parametrize(
    "brings",
    [
        "class options(msgspec.Struct):\n        size: int = 1",
        "def add_arguments(p): p.add_argument('--size', type=int)",
    ],
)
def test_middleware_brings_options_as_any_hook_does(write, brings):
    call = "async def __call__(self, scope, receive, send): ..."
    text = f"import msgspec\nclass Cache:\n    def __init__(self, app): ...\n    {call}\n    {brings}\n"
    config = parse.parse_run(["--miles-router-middleware-paths", write("cache.py", text) + ":Cache", "--size", "7"])
    assert config.extra["router_middleware"].values == {"size": 7}
