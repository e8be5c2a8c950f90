import pytest

from miles_api.errors import HookLoadError
from miles_api.loading.load import find, import_reference, origin_of


def load(reference):
    return import_reference(reference, short_names="miles.hooks.reward", flag="--custom-rm-path")


@pytest.fixture
def hook_file(tmp_path):
    (tmp_path / "helper_beside.py").write_text("VALUE = 5\n")
    file = tmp_path / "my_reward.py"
    file.write_text("from helper_beside import VALUE\n\ndef score(args, sample):\n    return VALUE\n")
    return file


def test_a_function_in_a_file_loads_with_what_lies_beside_it(hook_file):
    assert load(f"{hook_file}:score")(None, None) == 5


def test_dotted_and_colon_references_name_the_same_object():
    assert load("json.dumps") is load("json:dumps")


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("json:dmps", "'dumps'"),
        ("no_such_package.fn", "No module named 'no_such_package'"),
        ("no_such_name", "miles.hooks.reward 'no_such_name'"),
        ("missing.py:fn", "there is no file"),
        ("missing.py", "missing.py:function"),
    ],
)
def test_what_does_not_load_names_flag_reference_and_the_nearest_name(reference, message):
    with pytest.raises(HookLoadError) as error:
        load(reference)
    assert f"--custom-rm-path {reference}" in str(error.value)
    assert message in str(error.value)


def test_a_file_near_by_is_suggested(hook_file):
    with pytest.raises(HookLoadError, match=r"did you mean 'my_reward\.py'"):
        load(f"{hook_file.parent}/my_rewards.py:score")


def test_a_file_that_raises_on_import_says_what_it_raised(tmp_path):
    file = tmp_path / "broken.py"
    file.write_text("import not_there_either\n")
    with pytest.raises(HookLoadError, match=r"does not import: ModuleNotFoundError.*not_there_either"):
        load(f"{file}:fn")


def test_the_origin_names_file_hash_and_distribution(hook_file):
    origin = origin_of(find(f"{hook_file}:score", short_names="", flag=""))
    assert origin.file == str(hook_file)
    assert len(origin.sha256) == 64
    assert origin.distribution == ""
    assert origin_of(find("msgspec.structs:asdict", short_names="", flag="")).distribution == "msgspec"


def test_the_origin_of_a_partial_is_that_of_its_function(hook_file):
    hook_file.write_text("import functools\n\ndef score(k, args, sample): ...\n\nhalf = functools.partial(score, 2)\n")
    assert origin_of(find(f"{hook_file}:half", short_names="", flag="")).file == str(hook_file)


def test_the_origin_of_a_value_is_the_module_that_the_reference_names(tmp_path):
    file = tmp_path / "tools.py"
    file.write_text("SPECS = [{'type': 'function'}]\n")
    assert origin_of(find(f"{file}:SPECS", short_names="", flag="")).file == str(file)


@pytest.mark.parametrize(
    ("body", "reference", "missing"),
    [
        ("from megatron_that_is_not.core import x\n", "needs.py:fn", "megatron_that_is_not"),
        ("x = 1\n", "no_such_package.fn", None),
        ("x = 1\n", "json.no_such_module.fn", None),
        ("raise ImportError('libcuda.so.1')\n", "needs.py:fn", None),
        ("x = 1\n", "needs.py:fn", None),
    ],
)
def test_a_hook_that_needs_a_package_this_process_lacks_says_which(tmp_path, body, reference, missing):
    (tmp_path / "needs.py").write_text(body)
    with pytest.raises(HookLoadError) as error:
        load(f"{tmp_path}/{reference}" if reference.startswith("needs") else reference)
    assert error.value.missing == missing


def test_a_file_that_exits_on_import_is_a_hook_that_does_not_load(tmp_path):
    file = tmp_path / "script.py"
    file.write_text("import sys\ndef fn(): ...\nsys.exit(0)\n")
    with pytest.raises(HookLoadError, match="does not import: SystemExit: 0"):
        load(f"{file}:fn")


@pytest.mark.parametrize("reference", ["nearby_hook:three", "nearby_hook.three"])
def test_a_module_that_is_not_found_but_lies_here_as_a_file_is_suggested_as_that(tmp_path, monkeypatch, reference):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nearby_hook.py").write_text("def three(): ...\n")
    with pytest.raises(HookLoadError, match=r"did you mean the file nearby_hook\.py:three\?"):
        load(reference)


def test_a_dotted_module_that_lies_in_a_folder_here_is_suggested_as_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_hooks_here").mkdir()
    (tmp_path / "my_hooks_here" / "deep.py").write_text("def fn(): ...\n")
    with pytest.raises(HookLoadError, match=r"did you mean the file my_hooks_here/deep\.py:fn\?"):
        load("my_hooks_here.deep:fn")


def test_a_syntax_error_in_a_hook_file_shows_file_line_source_and_caret(tmp_path):
    file = tmp_path / "typo.py"
    file.write_text("x = 1\ndef fn(args sample):\n    return 1\n")
    with pytest.raises(HookLoadError) as error:
        load(f"{file}:fn")
    first, *rest = str(error.value).splitlines()
    assert "does not import: SyntaxError: " in first
    assert rest[0] == f'  File "{file}", line 2'
    assert rest[1] == "    def fn(args sample):"
    assert rest[2].strip("^ ") == ""
    assert "^" in rest[2]


def test_an_import_that_fails_in_a_hook_file_shows_its_file_and_line(tmp_path):
    (tmp_path / "outer_hook.py").write_text("import os\nimport inner_of_outer_hook\n")
    (tmp_path / "inner_of_outer_hook.py").write_text("\n\nfrom os import no_such_thing\n")
    with pytest.raises(HookLoadError) as error:
        load(f"{tmp_path}/outer_hook.py:fn")
    assert str(error.value).splitlines()[-1] == (
        f"  {tmp_path}/inner_of_outer_hook.py, line 3: from os import no_such_thing"
    )
