import subprocess
import sys
import warnings

import pytest

from miles_api import hooks, spec
from miles_api.cli import main
from miles_api.errors import MilesDeprecationWarning
from miles_api.golden import golden_facts
from miles_api.loading.bind import DEFAULT, bind


@pytest.fixture
def registry(monkeypatch):
    """Two hooks: `old` is deprecated itself, `halfold` passes a deprecated keyword."""
    monkeypatch.setattr(spec, "REGISTRY", {})
    declare = {"since": (1, 0), "side": "rollout", "default": "none", "moment": "sometimes"}

    @spec.hook(flag="--old-path", deprecated="1.3: use reward", **declare)
    def old(args, /):
        """Do something."""

    @spec.hook(flag="--halfold-path", deprecated_arguments={"budget": "1.4: use limit"}, **declare)
    def halfold(args, /, *, budget, limit):
        """Do something else."""

    return spec.REGISTRY


def warnings_of(hook, target, reference="mine.fn"):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        bind(hook, reference, target)
    return [str(item.message) for item in caught if item.category is MilesDeprecationWarning]


def test_a_deprecated_hook_warns_once_with_its_release_and_its_replacement(registry):
    expected = "--old-path mine.fn: the old hook is deprecated since 1.3: use reward"
    assert warnings_of(registry["old"], lambda args: 0) == [expected]


def test_a_default_implementation_of_a_deprecated_hook_warns_nobody(registry):
    assert warnings_of(registry["old"], lambda args: 0, DEFAULT) == []


def test_a_deprecated_argument_warns_those_who_name_it(registry):
    expected = "--halfold-path mine.fn takes 'budget', which is deprecated since 1.4: use limit"
    assert warnings_of(registry["halfold"], lambda args, *, budget: 0) == [expected]
    assert warnings_of(registry["halfold"], lambda args, *, limit: 0) == []
    assert warnings_of(registry["halfold"], lambda args, **keywords: 0) == []


_TWICE = """
from miles_api import hooks, spec
from miles_api.loading.bind import bind

@spec.hook(flag="--old-path", deprecated="1.3: use reward", since=(1, 0), side="rollout", default="", moment="start")
def old(args, /): ...

for name in ("a.fn", "a.fn", "b.fn"):
    bind(spec.REGISTRY["old"], name, old)
"""


def test_the_warning_is_shown_without_asking_once_for_each_hook():
    run = subprocess.run([sys.executable, "-c", _TWICE], capture_output=True, text=True, check=True, timeout=30)
    assert run.stderr.count("a.fn: the old hook is deprecated") == 1
    assert run.stderr.count("b.fn: the old hook is deprecated") == 1


@pytest.mark.parametrize(
    ("name", "text"), [("old", "since 1.3: use reward"), ("halfold", "budget since 1.4: use limit")]
)
def test_a_deprecation_is_shown_by_hooks_show(registry, monkeypatch, capsys, name, text):
    monkeypatch.setitem(hooks.REGISTRY, name, registry[name])
    assert main(["hooks", "show", name]) == 0
    shown = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("deprecated"))
    assert shown.partition("deprecated")[2].strip() == text


def test_a_deprecation_is_a_golden_fact(registry):
    facts = "\n".join(golden_facts(registry))
    assert "; deprecated since 1.3: use reward" in facts
    assert "; budget deprecated since 1.4: use limit" in facts


@pytest.mark.parametrize("text", ["use reward", "1.3:", "soon: use reward"])
def test_a_deprecation_names_a_version_and_a_replacement(text):
    with pytest.raises(ValueError, match="does not read as"):
        spec.Deprecation.of(text)
