"""The pages about hooks: fresh, linked, their examples run. What needs more than miles-api: tests/test_docs.py."""

import re
import sys
from pathlib import Path

import pytest

from miles_api.hooks import REGISTRY
from miles_api.loading.bind import resolve

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
sys.path.append(str(DOCS))

from generate import HOOKS_PAGE, hooks_page  # noqa: E402
from hook_example import example  # noqa: E402
from hook_facts import BY_LOOP, FAILURES, FIRES, NEEDS, RANKS  # noqa: E402
from run_blocks import blocks, run_blocks  # noqa: E402

WRITING = DOCS / "writing-a-hook.md"
NEEDS_MORE = ("In a run", "When it fails")
NAMES = {"agent_abort": "abort", "data_source": "DataSource", "router_middleware": "RouterMiddleware"}


def test_the_page_of_all_hooks_is_what_the_stubs_say():
    assert HOOKS_PAGE.read_text() == hooks_page(), "run `python docs/generate.py`"


def test_what_stands_beside_the_stubs_is_said_of_every_hook_once():
    named = [name for names, *_ in FAILURES for name in names]
    assert sorted(named) == sorted(REGISTRY)
    assert {*FIRES, *BY_LOOP, *NEEDS, *RANKS} <= set(REGISTRY)
    assert {name for name, spec in REGISTRY.items() if spec.needs} <= set(NEEDS)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_example_of_each_hook_behaves(name, tmp_path, check_hook):
    file = tmp_path / "example.py"
    file.write_text(example(REGISTRY[name]))
    if "import torch" in file.read_text():
        pytest.importorskip("torch")
    reference = f"{file}:{NAMES.get(name, name)}"
    if name == "model_provider":  # builds a Megatron model, which a trainer rank alone can
        resolve(REGISTRY[name], reference)
    else:
        check_hook(name, reference)


@pytest.mark.parametrize("name", REGISTRY)
def test_the_page_shows_each_example_as_it_was_checked(name):
    section = HOOKS_PAGE.read_text().split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert f"```python\n{example(REGISTRY[name])}\n```" in section


def test_the_blocks_of_writing_a_hook_that_need_miles_api_alone_run_and_say_what_is_shown(tmp_path):
    sections = dict.fromkeys(block.section for block in blocks(WRITING))
    assert set(NEEDS_MORE) < set(sections)
    assert run_blocks(WRITING, tmp_path, [name for name in sections if name not in NEEDS_MORE]) > 10


def test_the_blocks_of_the_page_on_versions_run_and_say_what_is_shown(tmp_path):
    assert run_blocks(DOCS / "abi.md", tmp_path) > 1


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


PLACES = ["*.md", "docs/*.md", "docs/contrib/*.md", "packages/*/README.md", "examples/*/README.md", "benchmarks/*.md"]


@pytest.mark.parametrize("page", [str(p.relative_to(ROOT)) for place in PLACES for p in sorted(ROOT.glob(place))])
def test_every_link_leads_somewhere(page):
    file = ROOT / page
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        found = (file.parent / path).resolve() if path else file
        assert found.exists(), target
        if anchor:
            assert anchor in {slug(line) for line in re.findall(r"^#+ (.+)$", found.read_text(), re.MULTILINE)}, target


# The runner itself: a page that does not say what happens is found out.


@pytest.mark.parametrize(
    ("block", "problem"),
    [
        ("```console\n$ echo one; echo two\ntwo\none\n```\n", "in this order): one"),
        ("```console\n$ echo 'rate 17/s'\nrate …/m\n```\n", "in this order): rate …/m"),
        ("```console\n$ exit 3\n```\n", "exit code 3, expected 0"),
        ("```console\n$ true  # exits 1\n```\n", "exit code 0, expected 1"),
        ("```python\nassert 1 == 2\n```\n", "page.md:3"),
        (
            "```python\n# file: kept.py\nfound = 1\n```\n\n```python\nimport kept\nassert kept.found == 2\n```\n",
            "page.md:8",
        ),
    ],
)
def test_a_page_that_shows_something_else_is_refused(block, problem, tmp_path):
    (tmp_path / "page.md").write_text(f"# A page\n{block}")
    with pytest.raises(AssertionError, match=re.escape(problem)):
        run_blocks(tmp_path / "page.md", tmp_path)


def test_a_page_that_shows_what_happens_passes(tmp_path):
    text = "```console\n$ echo one; echo two; echo three\none\n…\nthr…\n$ false # exits 1\n```\n"
    (tmp_path / "page.md").write_text(text)
    assert run_blocks(tmp_path / "page.md", tmp_path) == 2
