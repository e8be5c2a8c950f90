import asyncio
import inspect

import pytest

from miles_api import Args
from miles_api.errors import ConfigError
from miles_api.hook_options import HookOptions
from miles_api.loading.hookset import HookSet, differs

_LIFE = """
made, closed = [], []

class Rollout:
    def __init__(self, input):
        made.append(input)
        self.input = input
    def __call__(self, input): return self
    def close(self): closed.append("rollout")

class Score:
    def __init__(self, args): made.append(args)
    async def __call__(self, args, sample): return args
    async def aclose(self): closed.append("score")

class Bad(Score):
    async def aclose(self): raise RuntimeError("will not")

class Unready:
    def __init__(self): raise KeyError("no table")
    def __call__(self, args, sample): return 0.0

class Silent:
    pass

class Greedy:
    def __init__(self, args, more): pass
    def __call__(self, args, sample): return 0.0
"""


@pytest.fixture
def hooks(tmp_path):
    """Resolve hooks of one file by `flag=name`, and return the set with the file's own module."""
    file = tmp_path / "life.py"
    file.write_text(_LIFE)

    def make(names, **flags):
        options = dict.fromkeys(HookOptions.__struct_fields__)
        chosen = {f"{flag}_path": f"{file}:{name}" for flag, name in flags.items()}
        found = HookSet(Args({**options, **chosen}), names)
        return found, inspect.getmodule(found.many(names[0])[0].target) or inspect.getmodule(
            type(found.many(names[0])[0].target)
        )

    return make


def test_train_and_eval_that_name_the_same_class_share_the_instance_and_its_args(hooks):
    found, module = hooks(["rollout", "eval_rollout"], rollout_function="Rollout", eval_function="Rollout")
    train, evaluate = found.build("rollout", "input"), found.build("eval_rollout", "other input")
    assert train.target is evaluate.target
    assert train.view is evaluate.view
    assert module.made == ["input"]
    train("request")
    assert (train.stats.calls, evaluate.stats.calls) == (1, 0)


def test_a_class_is_built_once_however_often_it_is_asked_for(hooks):
    found, module = hooks(["rollout"], rollout_function="Rollout")
    assert found.build("rollout", "input").target is found.build("rollout", "again").target
    assert found.one("rollout").target.input == "input"
    assert module.made == ["input"]


def test_what_is_not_a_class_is_ready_as_it_is_and_what_is_not_there_is_none(hooks):
    found, _ = hooks(["reward", "eval_rollout_log"], custom_rm="Score")
    assert found.build("reward") is found.one("reward")
    assert found.build("eval_rollout_log") is None


def test_every_instance_is_closed_once_whatever_another_one_raises(hooks):
    found, module = hooks(
        ["rollout", "eval_rollout", "reward"], rollout_function="Rollout", eval_function="Rollout", custom_rm="Bad"
    )
    found.build("rollout", "input")
    found.build("eval_rollout", "input")
    with pytest.raises(RuntimeError, match="will not") as error:
        found.close()
    assert "raised while the reward hook" in error.value.__notes__[0]
    assert module.closed == ["rollout"]


def test_an_instance_is_closed_asynchronously_where_it_can_be(hooks):
    found, module = hooks(["reward"], custom_rm="Score")
    asyncio.run(found.aclose())
    assert module.closed == ["score"]


def test_a_class_that_fails_to_build_names_the_hook_in_its_own_traceback(hooks):
    with pytest.raises(KeyError, match="no table") as error:
        hooks(["reward"], custom_rm="Unready")
    assert "raised while the reward hook" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("name", "problem"), [("Silent", "without __call__"), ("Greedy", "cls\\(args\\) or cls\\(\\)")]
)
def test_a_class_that_cannot_be_built_or_called_is_refused(hooks, name, problem):
    with pytest.raises(ConfigError, match=problem):
        hooks(["reward"], custom_rm=name)


def test_the_report_says_what_a_hook_is_and_how_it_fared(hooks):
    found, _ = hooks(["reward"], custom_rm="Score")
    asyncio.run(found.need("reward").acall(None, None, None))
    found.need("reward").stats.skipped += 2
    found.need("reward").view.seen = 1
    (report,) = found.report()
    expected = {
        "hook": "reward", "flag": "--custom-rm-path", "configured": True, "moment": "rollout", "abi": "1.0",
        "checkable": True, "distribution": "", "calls": 1, "errors": 0, "timeouts": 0, "retries": 0, "skipped": 2,
        "drops": {}, "args_written": ["seen"],
    }  # fmt: skip
    assert {key: report[key] for key in expected} == expected
    assert report["file"].endswith("life.py")


def test_two_processes_that_loaded_other_code_differ_and_where_it_lies_does_not_matter():
    here = {
        "hook": "reward",
        "reference": "a.py:fn",
        "file": "/here/a.py",
        "sha256": "12",
        "distribution": "",
        "version": "",
    }
    there = {**here, "file": "/there/a.py"}
    assert differs(here, there) is None
    text = differs({**here, "process": "driver"}, {**there, "process": "rollout", "sha256": "34"})
    assert text == (
        "the reward hook a.py:fn is not the same everywhere: "
        "file hash 12 in driver (/here/a.py), 34 in rollout (/there/a.py)"
    )
    assert "version none in /here/a.py, 2.0 in /there/a.py" in differs(here, {**there, "version": "2.0"})
    assert "distribution" in differs(here, {**there, "distribution": "hooks-one"})
