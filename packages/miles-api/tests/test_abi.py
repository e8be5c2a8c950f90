import subprocess
import sys
from pathlib import Path

import pytest

import miles_api.hooks  # noqa: F401  (fills the registry)
from miles_api import Args
from miles_api.errors import ConfigError
from miles_api.golden import golden_facts
from miles_api.hook_options import HookOptions
from miles_api.loading.hookset import HookSet, configured_hooks
from miles_api.spec import REGISTRY

GOLDEN = Path(__file__).parent.parent / "abi" / "1.0-draft.txt"


def test_the_golden_facts_are_what_the_stubs_say():
    # A change here changes what users' hooks rely on: say so in ABI.md and regenerate the file as it describes.
    assert golden_facts() == GOLDEN.read_text().splitlines()


def test_importing_miles_api_brings_nothing_but_msgspec_and_the_standard_library():
    # msgspec itself takes typing_extensions where it is installed
    code = (
        "import sys, msgspec; old = set(sys.modules); import miles_api, miles_api.hooks; print(*set(sys.modules) - old)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    roots = {name.partition(".")[0] for name in run.stdout.split()}
    assert roots - sys.stdlib_module_names == {"miles_api"}


def test_every_flag_of_the_table_is_an_option():
    fields = set(HookOptions.__struct_fields__)
    assert {spec.field for spec in REGISTRY.values() if spec.field} == fields


def test_every_stub_says_when_it_is_called():
    for spec in REGISTRY.values():
        assert len(spec.doc.splitlines()) > 2, f"{spec.name} has no second paragraph"


def flat(**changes):
    return Args({**dict.fromkeys(HookOptions.__struct_fields__), "group_rm": False, **changes})


def test_group_rm_turns_the_reward_flag_into_a_group_reward():
    assert set(configured_hooks(flat(custom_rm_path="json:dumps"))) == {"reward"}
    assert set(configured_hooks(flat(custom_rm_path="json:dumps", group_rm=True))) == {"group_reward"}


def test_a_hook_set_reports_every_hook_that_does_not_load():
    args = flat(custom_rm_path="json:nothing", buffer_filter_path="nowhere.fn")
    with pytest.raises(ConfigError) as error:
        HookSet(args, ["reward", "buffer_filter"])
    assert "json:nothing" in str(error.value)
    assert "nowhere.fn" in str(error.value)
