"""Rewards put together: what each way gives, what it saves, and what is refused."""

import asyncio

import pytest

from miles_api.errors import ConfigError, HookResultError
from miles_api.testing import check_hook, hook_args, make_sample
from miles_hooks_contrib.compose import Compose

PARTS = '''
import msgspec

class Options(msgspec.Struct, frozen=True, kw_only=True):
    length_scale: float
    """By what a length is divided."""
    length_shift: float = 0.0
    """What is added."""

class Length:
    options = Options
    closed = []
    def __init__(self, args):
        self.scale = args.length_scale
    async def __call__(self, args, sample):
        return len(sample.response) / self.scale + args.length_shift
    def close(self):
        self.closed.append(self)

calls = []

def is_right(args, sample):
    return 1.0 if sample.response == sample.label else 0.0

def counted(args, sample):
    calls.append(sample.index)
    return 0.5

async def several(args, sample):
    return {"reward": 0.25, "style": 9.0}

def nameless(args, sample):
    return {"style": 9.0}

def broken(args, sample):
    return None
'''


@pytest.fixture
def part(tmp_path):
    """Return references to functions of a file of rewards."""
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    return lambda name: f"{file}:{name}"


def score(of, *samples, **options):
    """Score samples one after the other with `of`, pairs of a part and its factor."""
    hook = Compose(hook_args(Compose, compose_of=dict(of), **options))

    async def scored():
        try:
            return [await hook(hook_args(), sample) for sample in samples or [make_sample(response="7", label="7")]]
        finally:
            await hook.aclose()

    return asyncio.run(scored())


def test_each_way_of_putting_scores_together(part):
    of = [(part("is_right"), 2.0), (part("counted"), 3.0)]
    assert {way: score(of, compose_by=way) for way in ("sum", "product", "min", "max")} == {
        "sum": [3.5], "product": [3.0], "min": [1.5], "max": [2.0]
    }  # fmt: skip


def test_a_gate_that_is_shut_saves_what_stands_behind_it(part):
    of = [(part("is_right"), 1.0), (part("counted"), 1.0)]
    right, wrong = make_sample(index=1, response="7", label="7"), make_sample(index=2, response="8", label="7")
    assert score(of, right, wrong) == [0.5, 0.0]
    from miles_api.loading.load import import_reference

    assert import_reference(part("calls"), short_names="miles.hooks.reward", flag="--x") == [1]


def test_a_part_has_options_of_its_own_and_is_closed(part):
    of = [(part("Length"), 1.0)]
    assert score(of, compose_options={"Length": {"length_scale": 4.0}}) == [0.25]
    assert score(of, compose_options={"Length": {"length_scale": 4, "length_shift": 1.0}}) == [1.25]
    from miles_api.loading.load import import_reference

    assert len(import_reference(part("Length"), short_names="miles.hooks.reward", flag="--x").closed) == 2


def test_of_a_dict_the_reward_counts(part):
    assert score([(part("several"), 2.0)]) == [0.5]
    with pytest.raises(HookResultError, match="one number"):
        score([(part("nameless"), 1.0)])


def test_a_part_that_returns_no_number_fails_the_score(part):
    with pytest.raises(HookResultError, match=r"broken, a part of --compose-of, returned None"):
        score([(part("broken"), 1.0)])


def test_kinds_are_those_of_rm_type():
    pytest.importorskip("miles_rollout")
    sample = make_sample(response="the cat sat", label="the cat")
    [f1] = score([("f1", 1.0)], sample)
    assert f1 == pytest.approx(2 / 3)
    assert score([("f1", 1.0), ("boxed_f1", 1.0)], sample, compose_by="min") == [0.0]


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("Length", {}, "length_scale"),
        ("Length", {"length_skale": 1.0}, "did you mean 'length_scale'"),
        ("Length", {"length_scale": "long"}, "Expected `float`"),
        ("is_right", {"x": 1}, "brings no options"),
        ("is_wrong", {}, "has no 'is_wrong'"),
    ],
)
def test_a_part_or_an_option_that_cannot_be_is_refused(part, name, options, told):
    given = {"compose_options": {name: options}} if options else {}
    with pytest.raises(ConfigError, match=told):
        Compose(hook_args(Compose, compose_of={part(name): 1.0}, **given))


def test_no_parts_and_options_of_none_are_refused(part):
    with pytest.raises(ConfigError, match="--compose-of is empty"):
        Compose(hook_args(Compose, compose_of={}))
    with pytest.raises(ConfigError, match="two parts named 'is_right'"):
        Compose(hook_args(Compose, compose_of={part("is_right"): 1.0, "elsewhere.py:is_right": 1.0}))
    with pytest.raises(ConfigError, match="no part"):
        Compose(hook_args(Compose, compose_of={part("is_right"): 1.0}, compose_options={"other": {"x": 1}}))


def test_it_keeps_to_its_signature(part):
    check_hook("reward", Compose, compose_of={part("is_right"): 1.0, part("several"): 1.0}, compose_by="sum")
