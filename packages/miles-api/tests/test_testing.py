"""The conformance kit: its report, its errors, its options, how it calls hooks."""

import asyncio
import copy
import re
import subprocess
import sys
import threading
import time
from typing import Annotated

import msgspec
import pytest

from miles_api import Sample, Status
from miles_api.errors import ConfigError, HookSignatureError, MilesError
from miles_api.hooks import REGISTRY
from miles_api.testing import ConformanceError, Engine, trial
from miles_api.testing import check_hook as check
from miles_api.testing.cases import CASES
from miles_api.testing.options import ReliedOn


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


def generated(sample, *, text="7"):
    sample.tokens = [5, 6]
    sample.append_response_tokens([7], log_probs=[-0.5], text=text)
    sample.status = Status.COMPLETED
    return sample


def test_every_hook_of_the_table_has_checks_in_the_file_of_its_stage():
    assert set(CASES) == set(REGISTRY)
    for name, spec in REGISTRY.items():
        assert CASES[name].run.__module__ == f"miles_api.testing.cases.{spec.stage}"


def test_a_report_names_every_check_that_passed_and_what_was_not_seen():
    report = check("reward", lambda args, sample: 1.0)
    assert report.passed == [
        "scores a finished sample",
        "scores a truncated sample",
        "scores a sample with an empty response",
        "scores several samples at once",
    ]
    assert report.left_out == "whether the scores are right"


def test_what_is_wrong_is_an_assertion_and_an_error_of_miles_and_names_hook_check_sample_and_field():
    error = refused("reward", lambda args, sample: 1.0 if sample.response else float("nan"))
    assert isinstance(error, AssertionError)
    assert isinstance(error, MilesError)
    assert (error.hook, error.check) == ("reward", "scores a sample with an empty response")
    assert (error.sample, error.field) == (2, "reward")
    assert "reward hook" in str(error)
    assert "sample 2" in str(error)
    assert "nan" in str(error)


def test_a_hooks_own_exception_is_the_cause_and_its_sample_is_named():
    error = refused("reward", lambda args, sample: sample.metadata["answer"])
    assert isinstance(error.__cause__, KeyError)
    assert "raised KeyError: 'answer'" in str(error)
    assert "What is 3 + 4?" in str(error)
    assert error.sample == 0


def test_a_hook_that_does_not_fit_is_refused_by_its_signature():
    with pytest.raises(HookSignatureError, match="too many positional arguments"):
        check("reward", lambda sample: 1.0)


def test_a_name_that_is_no_hook_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'reward'"):
        check("rewards", lambda args, sample: 1.0)


@pytest.mark.parametrize("body", ["return None", "raise KeyError('x')"])
def test_pytest_shows_the_users_test_the_users_hook_and_no_line_of_ours(body, tmp_path):
    (tmp_path / "test_it.py").write_text(
        f"def reward(args, sample):\n    {body}\n\n"
        "def test_by_fixture(check_hook):\n    check_hook('reward', reward)\n\n"
        "def test_by_import():\n    from miles_api.testing import check_hook\n    check_hook('reward', reward)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "test_it.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    shown = done.stdout.partition("short test summary")[0]
    assert "2 failed" in done.stdout
    assert "E       miles_api.testing.result.ConformanceError" in shown
    assert set(re.findall(r"^(\S+\.py):\d+:", shown, re.MULTILINE)) == {"test_it.py"}
    assert "None as reward" in shown if body == "return None" else body in shown
    assert shown.count("direct cause") == (0 if body == "return None" else 2)


# Options


def test_every_option_that_hooks_may_rely_on_is_there_and_can_be_set(hook_args):
    args = hook_args(rollout_max_response_len=5, seed=9)
    assert (args.rollout_max_response_len, args.seed) == (5, 9)
    assert args.custom_rm_path is None
    assert {name: getattr(args, name) for name in ReliedOn.__struct_fields__}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rollout_max_response_length": 5}, "did you mean 'rollout_max_response_len'"),
        ({"rollout_batch_size": "many"}, "rollout_batch_size"),
        ({"rollout_batch_size": 0}, "rollout_batch_size"),
    ],
)
def test_an_option_that_is_none_or_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check("reward", lambda args, sample: 1.0, **options)


def test_a_hook_reads_the_options_that_it_brings():
    class Bonus(msgspec.Struct, frozen=True):
        bonus: Annotated[float, msgspec.Meta(ge=0)] = 0.5

    seen = []

    def reward(args, sample):
        seen.append(args.bonus)
        return args.bonus

    reward.options = Bonus
    check("reward", reward)
    check("reward", reward, bonus=2.0)
    assert set(seen) == {0.5, 2.0}
    with pytest.raises(ConfigError, match="bonus"):
        check("reward", reward, bonus=-1.0)


def test_a_hook_reads_the_flags_that_it_declares_to_a_parser():
    def reward(args, sample):
        return args.my_weight

    reward.add_arguments = lambda parser: parser.add_argument("--my-weight", type=float, default=1.0)
    assert check("reward", reward, my_weight=0.25).passed


def test_with_a_reward_key_rewards_are_dicts():
    seen = set()

    def post_process(args, samples):
        seen.update(type(sample.reward) for sample in samples)
        values = [sample.get_reward_value(args) for sample in samples]
        return values, values

    check("reward_post_process", post_process)
    assert seen == {float}
    check("reward_post_process", post_process, reward_key="accuracy")
    assert seen == {float, dict}


def test_ones_own_samples_take_the_place_of_made_ones(make_sample):
    own = [make_sample(label={"unit": "cm"}, metadata={"answer": i}) for i in range(2)]
    kept = copy.deepcopy(own)
    assert check("reward", lambda args, sample: float(sample.metadata["answer"]), samples=own).passed
    assert own == kept

    async def generate(args, sample, sampling_params):
        assert sample.response_length == 0
        return generated(sample, text=sample.label["unit"])

    assert check("generate", generate, samples=own).passed


def test_a_sample_of_ones_own_needs_no_tokens():
    def reward(args, sample):
        return float(len(sample.tokens) > sample.response_length)

    assert check("reward", reward, samples=[Sample(prompt="a", response="b")]).passed
    with pytest.raises(ConfigError, match="samples is empty"):
        check("reward", reward, samples=[])


def test_the_kit_works_inside_an_event_loop():
    async def inside():
        return check("reward", lambda args, sample: 1.0).passed

    assert asyncio.run(inside())


def test_a_reference_is_loaded_as_a_run_loads_it(tmp_path):
    (tmp_path / "mine.py").write_text("class Score:\n    def __call__(self, args, sample):\n        return 1.0\n")
    assert check("reward", f"{tmp_path}/mine.py:Score").reference.endswith("mine.py:Score")


def test_a_class_is_built_once_and_closed():
    events = []

    class Score:
        def __init__(self, args):
            events.append(args.seed)

        async def __call__(self, args, sample):
            return 1.0

        async def aclose(self):
            events.append("closed")

    assert check("reward", Score, seed=4).passed[-1] == "closes"
    assert events == [4, "closed"]


# How hooks are called


def test_an_async_hook_that_keeps_the_event_loop_is_found(monkeypatch):
    monkeypatch.setattr(trial, "BLOCK_LIMIT", 0.05)

    async def blocks(args, sample):
        time.sleep(0.1)
        return 1.0

    def may_block(args, sample):
        time.sleep(0.1)
        return 1.0

    assert "kept the event loop" in str(refused("reward", blocks))
    assert check("reward", may_block).passed


def test_a_hook_that_does_not_return_is_given_up(monkeypatch):
    monkeypatch.setattr(trial, "DEADLINE", 0.1)
    released = threading.Event()
    try:
        error = refused("reward", lambda args, sample: released.wait(20))
    finally:
        released.set()
    assert "did not return within" in str(error)


def test_a_timeout_of_the_hooks_own_is_its_own():
    def reward(args, sample):
        raise TimeoutError("the judge")

    assert "raised TimeoutError: the judge" in str(refused("reward", reward))


def test_awaited_hooks_are_called_at_the_same_time():
    running, most = 0, 0

    async def reward(args, sample):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.01)
        running -= 1
        return 1.0

    check("reward", reward)
    assert most == 4


# The engine


def test_the_engine_keeps_to_the_length_that_is_asked_for_and_refuses_what_is_no_prompt():
    engine = Engine()
    asked = {"input_ids": [5, 6, 7, 8], "return_logprob": True, "sampling_params": {"max_new_tokens": 2}}
    reply = engine.answer("/generate", asked)
    assert reply["output_ids"] == [5, 6]
    assert [entry[1] for entry in reply["meta_info"]["output_token_logprobs"]] == [5, 6]
    assert reply["meta_info"]["finish_reason"]["type"] == "length"
    for bad in ({}, {"input_ids": []}, {"input_ids": ["a"]}):
        with pytest.raises(ValueError, match="input_ids"):
            engine.answer("/generate", bad)
