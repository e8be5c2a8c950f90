"""The pages of docs/ against all packages; what miles-api alone can tell is in that package's tests."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from miles_api.config import option_groups
from miles_api.parsing.flags import option_strings
from miles_api.parsing.parse import parse_run
from miles_api.run_options import RunOptions
from miles_api.testing.options import ReliedOn
from miles_rollout import failures
from miles_rollout.hook_names import CALLED_BY_LOOP, CALLED_BY_SERVICE
from miles_rollout.options import FailureOptions
from miles_router.check import HOOKS as OF_ROUTER
from miles_train import advantages, estimators
from miles_train.estimators import ESTIMATORS
from miles_train.options import ObjectiveOptions
from miles_train.train_hooks import TRAIN_HOOKS

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "docs"))

from hook_facts import BY_LOOP, FAILURES, ONCE  # noqa: E402
from run_blocks import run_blocks  # noqa: E402


def test_the_blocks_of_writing_a_hook_that_start_runs_run_and_say_what_is_shown(quickstart_data, tmp_path):
    quickstart = tmp_path / "examples" / "quickstart"
    (quickstart / "data").mkdir(parents=True)
    shutil.copy(ROOT / "examples" / "quickstart" / "reward.py", quickstart)
    shutil.copytree(quickstart_data / "model", quickstart / "data" / "warm")
    shutil.copy(quickstart_data / "train.jsonl", quickstart / "data")
    sections = ["Five minutes", "Several in a row", "In a run", "When it fails"]
    assert run_blocks(ROOT / "docs" / "writing-a-hook.md", tmp_path, sections) > 15


def test_the_runs_of_the_page_on_tools_and_agents_are_ready_to_start(quickstart_data, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(quickstart_data / "model", model)
    (model / "chat_template.jinja").write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    text = (ROOT / "docs" / "tools-and-agents.md").read_text()
    # The model of the page is a download, and its runs take minutes.
    (tmp_path / "page.md").write_text(re.sub(r"^\$ (hatch|mkdir|miles train) .*\n", "", text, flags=re.MULTILINE))
    assert run_blocks(tmp_path / "page.md", tmp_path) > 3


def test_the_table_of_failures_follows_who_calls_each_hook():
    deadlines = {names: deadline for names, deadline, *_ in FAILURES}
    assert BY_LOOP == CALLED_BY_LOOP
    assert set(ONCE) == {*CALLED_BY_SERVICE, "all_samples_process"} - {"rollout", "eval_rollout", "data_source"}
    assert set(TRAIN_HOOKS) in [set(names) for names in deadlines]
    assert set(OF_ROUTER) in [set(names) for names in deadlines]


def test_every_name_that_hooks_may_rely_on_can_be_read_in_a_run():
    args = parse_run([]).args
    lacking = [name for name in (*RunOptions.__struct_fields__, *ReliedOn.__struct_fields__) if not hasattr(args, name)]
    assert lacking == []


@pytest.mark.parametrize("field", FailureOptions.__struct_fields__)
def test_the_defaults_of_the_failure_policy_are_those_that_the_page_names(field):
    text = (ROOT / "docs" / "writing-a-hook.md").read_text()
    flag = f"`--{field.replace('_', '-')}`"
    default = getattr(FailureOptions(), field)
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    assert re.search(rf"{flag} [^(]*\(`?{re.escape(shown)}(?!\w)", text), f"{flag} … ({shown})"


def test_the_number_of_threads_and_of_saved_samples_are_those_that_the_page_names():
    text = (ROOT / "docs" / "writing-a-hook.md").read_text()
    assert (failures._THREADS, failures._SAVED) == (8, 16)
    assert "a thread, of which there are eight" in text
    assert "up to sixteen of them" in text


def test_the_index_names_every_page_package_and_example():
    text = (ROOT / "docs" / "README.md").read_text()
    pages = [page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md"]
    others = [*ROOT.glob("packages/*/README.md"), *ROOT.glob("examples/*/README.md")]
    pages += [f"../{page.relative_to(ROOT)}" for page in others]
    assert [page for page in pages if f"]({page})" not in text] == []


def test_every_file_that_the_page_on_security_names_is_there():
    text = (ROOT / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(miles_\w+/[\w/.]+\.\w+)`", text))
    assert len(named) > 15
    missing = [name for name in named if not list(ROOT.glob(f"packages/*/src/{name}"))]
    assert missing == []


def test_the_page_of_objectives_names_every_choice_and_only_flags_and_files_that_exist(tmp_path):
    page = ROOT / "docs" / "algorithms.md"
    text = page.read_text()
    rows = set(re.findall(r"^\| (?:with )?`?([\w ]+)`? \|", text, re.MULTILINE))
    assert {*ESTIMATORS, *get_args(get_type_hints(ObjectiveOptions)["policy_loss_type"])} <= rows
    flags = {flag for kind in option_groups().values() for flag in option_strings(kind)}
    assert set(re.findall(r"`(--[a-z-]+)", text)) <= flags
    assert set(re.findall(r"`(?:estimators|advantages)\.(?!py`)(\w+)`", text)) <= {
        *estimators.__all__,
        *advantages.__all__,
    }
    assert run_blocks(page, tmp_path) == 1
