import pytest

from miles_api.errors import HookLoadError
from miles_api.load import import_reference, origin_of


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
    origin = origin_of(load(f"{hook_file}:score"))
    assert origin.file == str(hook_file)
    assert len(origin.sha256) == 64
    import msgspec

    assert origin_of(msgspec.structs.asdict).distribution == "msgspec"
