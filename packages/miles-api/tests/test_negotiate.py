import inspect
import json
import os
import subprocess
import sys
import zipfile

import pytest

from miles_api import abi, spec
from miles_api._version import __version__
from miles_api.abi import ABI, ABI_OF_RELEASE
from miles_api.errors import HookSignatureError, HookVersionError
from miles_api.golden import golden_facts
from miles_api.hooks import REGISTRY
from miles_api.loading import fit
from miles_api.loading.bind import bind
from miles_api.loading.negotiate import abi_of_requirement


def reward(args, sample):
    return 1.0


def bound(target, hook="reward"):
    return bind(REGISTRY[hook], "mine.fn", target)


@pytest.fixture
def toy(monkeypatch):
    """A registry of an ABI 1.2, whose one hook gained `budget` in 1.1 and `limit` in 1.2."""
    monkeypatch.setattr(spec, "REGISTRY", {})
    monkeypatch.setattr(abi, "ABI", (1, 2))

    @spec.hook(flag="--toy-path", since=(1, 0), side="rollout", default="none", moment="sometimes",
               added={"budget": (1, 1), "limit": (1, 2)})  # fmt: skip
    def toy(args, /, *, budget, limit):
        """Do something."""

    return spec.REGISTRY["toy"]


def written_for(version, target):
    target.__miles_abi__ = version
    return target


def call(toy, target):
    return bind(toy, "mine.fn", target)(None, budget=2, limit=3)


def test_the_installed_release_ships_the_current_abi():
    assert abi_of_requirement(f"miles-api=={__version__}") == ABI
    assert ABI_OF_RELEASE[max(ABI_OF_RELEASE)] == ABI


@pytest.mark.parametrize(
    ("requirement", "version"),
    [
        ("miles-api>=0.1", (1, 0)),
        ("miles_api (>=0.1.3,<1)", (1, 0)),
        ("Miles.API[x] ~= 1.0 ; python_version >= '3.11'", (1, 0)),
        ("miles-api<2,>=1", (1, 0)),
        ("miles-api==0.*", (1, 0)),
        ("miles-api>=2.0,<3", (2, 0)),
        ("miles-api>=1.0,!=1.0.3,>=2.1", (2, 1)),
        ("miles-api", None),
        ("miles-api<2", None),
        ("miles-api @ https://example.org/miles-api-9.0.whl", None),
        ("miles-api>=9; extra == 'dev'", None),
        ("miles-api-extra>=9", None),
        ("msgspec>=9", None),
    ],
)
def test_the_lower_bound_of_a_requirement_says_which_abi_a_distribution_was_written_for(requirement, version):
    assert abi_of_requirement(requirement) == version


def test_a_hook_says_its_abi_itself_and_otherwise_has_the_current_one():
    assert bound(lambda args, sample: 0.0).abi.version == ABI
    assert bound(written_for((1, 0), lambda args, sample: 0.0)).abi.said_by == "its __miles_abi__"


@pytest.mark.parametrize("version", [(2, 0), (0, 9), (1, 1)])
def test_another_major_or_a_newer_minor_is_refused_with_both_versions(version):
    with pytest.raises(HookVersionError) as error:
        bound(written_for(version, lambda args, sample: 0.0))
    assert "--custom-rm-path mine.fn" in str(error.value)
    assert f"ABI {version[0]}.{version[1]} (its __miles_abi__)" in str(error.value)
    assert f"ABI 1.0 (miles-api {__version__})" in str(error.value)


@pytest.mark.parametrize("version", ["1.0", (1,), (1, "0"), 1])
def test_a_version_that_is_no_major_and_minor_is_refused(version):
    with pytest.raises(HookVersionError, match="not \\(major, minor\\)"):
        bound(written_for(version, lambda args, sample: 0.0))


def test_a_hook_that_does_not_fit_is_refused_with_both_versions_only_where_they_differ(monkeypatch):
    wrong = written_for((1, 0), lambda args, sample, extra: 0.0)
    with pytest.raises(HookSignatureError, match="does not fit") as error:
        bound(wrong)
    assert "versions:" not in str(error.value)
    monkeypatch.setattr(fit, "ABI", (1, 2))
    monkeypatch.setattr(abi, "ABI", (1, 2))
    with pytest.raises(HookSignatureError, match=r"calls by ABI 1\.2, it was written for ABI 1\.0 \(its __miles_abi__"):
        bound(wrong)


def test_a_hook_of_an_older_minor_gets_the_keywords_it_accepts(toy):
    assert call(toy, written_for((1, 1), lambda args, *, budget: budget)) == 2


def test_a_parameter_of_an_older_hook_is_not_taken_for_a_newer_keyword_of_the_same_name(toy):
    assert call(toy, written_for((1, 1), lambda args, *, budget, limit="own": (budget, limit))) == (2, "own")
    assert call(toy, written_for((1, 0), lambda args, budget="own", **others: (budget, others))) == (
        "own",
        {"limit": 3},
    )


def test_an_older_hook_that_takes_any_keyword_gets_all(toy):
    assert call(toy, written_for((1, 0), lambda args, **all_of_them: all_of_them)) == {"budget": 2, "limit": 3}


def test_a_newer_keyword_that_an_older_hook_requires_is_not_passed_and_so_refused(toy):
    with pytest.raises(HookSignatureError, match="missing a required argument: 'limit'"):
        call(toy, written_for((1, 0), lambda args, *, limit: 0))


def test_a_bare_signature_gets_everything_and_is_not_checkable(toy):
    hook = bind(toy, "mine.fn", lambda *args, **keywords: (args, keywords))
    assert hook(None, budget=2, limit=3) == ((None,), {"budget": 2, "limit": 3})
    assert not hook.checkable
    assert bound(lambda args, sample: 0.0).checkable
    assert not bound(max).checkable


def test_when_a_keyword_came_is_a_golden_fact(toy):
    facts = golden_facts(spec.REGISTRY)
    assert any(fact.startswith("hook toy/plain") and "budget since 1.1; limit since 1.2" in fact for fact in facts)


def test_a_keyword_that_a_hook_does_not_pass_cannot_be_declared_as_added():
    with pytest.raises(ValueError, match="toy_two passes no keyword budged"):
        spec.hook(flag=None, since=(1, 0), side="rollout", default="none", moment="sometimes", name="toy_two",
                  added={"budged": (1, 1)})(lambda args, /, *, budget: 0)  # fmt: skip


def wheel(folder, name, requirement, body):
    """Write the smallest wheel that pip installs: one module, and one reward under the short name `name`."""
    info = f"hooks_{name}-1.0.dist-info"
    files = {
        f"hooks_{name}.py": body,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: hooks-{name}\nVersion: 1.0\n{requirement}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": f"[miles.hooks.reward]\n{name} = hooks_{name}:score\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"hooks_{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for inside, text in files.items():
            archive.writestr(inside, text)
    return str(path)


_USE_EACH = """
import json
from miles_api import Sample
from miles_api.errors import MilesError
from miles_api.loading.hookset import HookSet
from miles_api.parsing.parse import parse_run

said = {}
for name in ("one", "two", "marked"):
    try:
        hooks = HookSet(parse_run(["--custom-rm-path", name]).args, ["reward"])
        said[name] = [hooks.need("reward")(None, Sample()), hooks.report()[0]]
    except MilesError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


def test_an_installed_hook_of_abi_1_runs_and_one_of_abi_2_is_refused_before_anything_starts(tmp_path):
    score = "def score(args, sample):\n    return 0.5\n"
    wheels = [
        wheel(tmp_path, "one", "Requires-Dist: miles-api>=1.0,<2\n", score),
        wheel(tmp_path, "two", "Requires-Dist: miles-api>=2.0,<3\n", score),
        wheel(tmp_path, "marked", "", score + "score.__miles_abi__ = (2, 0)\n"),
    ]
    target = str(tmp_path / "site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-cache-dir"]
    subprocess.run([*pip, "--disable-pip-version-check", "--target", target, *wheels], check=True, timeout=120)
    paths = os.pathsep.join(filter(None, [target, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-c", _USE_EACH], env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True,
        check=True, timeout=60,
    )  # fmt: skip
    said = json.loads(run.stdout)
    reward, report = said["one"]
    assert reward == 0.5
    assert (report["abi"], report["distribution"], report["version"]) == ("1.0", "hooks-one", "1.0")
    ours = f"but this is ABI 1.0 (miles-api {__version__})"
    assert f"two was written for ABI 2.0 (hooks-two requires miles-api>=2.0,<3), {ours}" in said["two"]
    assert f"marked was written for ABI 2.0 (its __miles_abi__), {ours}" in said["marked"]


def test_the_outer_callable_says_what_a_decorated_hook_takes():
    import functools

    @functools.wraps(reward)
    def outer(*args, **keywords):
        return reward(*args, **keywords)

    assert inspect.signature(outer) == inspect.signature(reward)
    assert not bound(outer).checkable
