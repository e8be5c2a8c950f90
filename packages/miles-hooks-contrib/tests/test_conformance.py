"""Every hook that this distribution offers, as the conformance kit calls it: a new entry point is covered by itself."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest

from miles_api.hooks import REGISTRY
from miles_api.loading.load import entry_points
from miles_api.testing import make_sample

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
GROUPS = {group: points for group, points in PROJECT["entry-points"].items() if group.startswith("miles.hooks.")}
HOOKS = [(group.removeprefix("miles.hooks."), name) for group, points in GROUPS.items() for name in points]
REFERENCES = {(group.removeprefix("miles.hooks."), n): r for group, points in GROUPS.items() for n, r in points.items()}

PROGRAM = make_sample(response="print(7)", label=["assert True"])
NEEDED_OPTIONS = {
    "dapo_overlong": {"overlong_cache": 4},
    "pass_at_k": {"pass_at_k": 2},
    "code_execution": {"samples": [PROGRAM], "allow_unsandboxed": True},
    "compose": {
        "samples": [PROGRAM],
        "compose_of": {"code_execution": 1.0},
        "compose_options": {"code_execution": {"allow_unsandboxed": True}},
    },
    ("generate", "search_r1"): {"search_url": "http://127.0.0.1:9/retrieve"},
}
"""Options without a default, by short name, or by hook and short name where several hooks share it."""

NEEDED_LIBRARIES = {
    ("generate", "search_r1"): "aiohttp",
    ("reward", "llm_judge"): "aiohttp",
    ("reward_post_process", "dapo_overlong"): "miles_rollout",
    ("reward_post_process", "length_reward"): "miles_rollout",
}
"""What a hook needs of an extra, or of the package whose default it hands over to, by hook and short name."""

ASK_A_SERVER = {"llm_judge"}
"""Short names of hooks that score nothing without one: their own tests call the kit."""

HAVE_TORCH = {"dr_grpo", "icepop", "mis", "seq_mis", "tis"}
"""Short names of hooks whose module may import torch: those that compute on tensors."""


WITHOUT_TORCH = [pair for pair in HOOKS if pair[1] not in HAVE_TORCH]
HEAVY = {"torch", "numpy", "ray", "megatron", "miles_rollout", "miles_train", "miles_router"}
IMPORT_ONE_BY_ONE = f"""
import importlib, json, sys
heavy = {{}}
for module in sys.argv[1:]:
    before = set(sys.modules)
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        continue
    heavy[module] = sorted({HEAVY!r} & set(sys.modules) - before)
print(json.dumps(heavy))
"""


def module_of(hook, name):
    return REFERENCES[hook, name].partition(":")[0]


@pytest.fixture(scope="module")
def heavy_imports():
    """Return which of the heavy packages each module is the first to import, by module."""
    modules = dict.fromkeys(module_of(*pair) for pair in WITHOUT_TORCH)
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ONE_BY_ONE, *modules], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize(("hook", "name"), [pair for pair in HOOKS if pair[1] not in ASK_A_SERVER])
def test_a_hook_does_what_its_stub_says(hook, name, check_hook):
    if name in HAVE_TORCH:
        pytest.importorskip("torch")
    if (hook, name) in NEEDED_LIBRARIES:
        pytest.importorskip(NEEDED_LIBRARIES[hook, name])
    check_hook(hook, name, **NEEDED_OPTIONS.get((hook, name), NEEDED_OPTIONS.get(name, {})))


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_the_installed_entry_point_is_the_one_of_pyproject_toml(hook, name):
    [point] = entry_points(REGISTRY[hook].group)[name]
    assert point.value == REFERENCES[hook, name], "install the distribution again: its entry points changed"


@pytest.mark.parametrize(("hook", "name"), WITHOUT_TORCH)
def test_a_hook_that_computes_no_tensors_imports_neither_torch_nor_a_sibling_package(hook, name, heavy_imports):
    if (hook, name) in NEEDED_LIBRARIES:
        pytest.importorskip(NEEDED_LIBRARIES[hook, name])
    assert heavy_imports[module_of(hook, name)] == []


@pytest.mark.parametrize(("hook", "name"), HOOKS)
def test_every_option_of_a_hook_is_documented(hook, name):
    if (hook, name) in NEEDED_LIBRARIES:
        pytest.importorskip(NEEDED_LIBRARIES[hook, name])
    pytest.importorskip("torch") if name in HAVE_TORCH else None
    target = entry_points(REGISTRY[hook].group)[name][0].load()
    options = getattr(target, "options", None)
    if options is None:
        return
    source = Path(sys.modules[options.__module__].__file__).read_text()
    for field in msgspec.structs.fields(options):
        _, _, after = source.partition(f"    {field.name}: ")
        assert after.partition("\n")[2].lstrip().startswith('"""'), f"{options.__name__}.{field.name} says nothing"


def test_every_short_name_has_a_row_in_the_catalogue_and_a_page():
    docs = Path(__file__).parents[3] / "docs" / "contrib"
    if not docs.is_dir():
        pytest.skip("the distribution's own tests, without the repository")
    rows = [line for line in (docs / "README.md").read_text().splitlines() if line.startswith("| `")]
    for hook, name in HOOKS:
        mine = [row for row in rows if row.startswith(f"| `{name}` | [`{hook}`]")]
        assert len(mine) == 1, f"docs/contrib/README.md has {len(mine)} rows for the {hook} hook {name}"
        page = mine[0].rpartition("](")[2].partition(")")[0].partition("#")[0]
        assert (docs / page).is_file(), f"{name}: no page {page}"
