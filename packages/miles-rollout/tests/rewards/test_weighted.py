import math
import re
import sys
import textwrap
import threading

import msgspec
import pytest

from miles_api.checks.check import check_run, derive
from miles_api.config import DERIVED
from miles_api.errors import HookError, HookResultError, SampleError
from miles_api.loading.hookset import differs
from miles_api.options import field_docs
from miles_api.parsing.parse import parse_run
from miles_api.sample import Sample
from miles_api.testing import check_hook, make_sample
from miles_rollout.check import check, notes
from miles_rollout.metrics import reward_parts, rollout_metrics
from miles_rollout.options import RewardOptions
from miles_rollout.rewards import KINDS
from miles_rollout.rewards.f1 import f1_score
from miles_rollout.service import RolloutWorker

LENGTH = "def length(args, sample):\n    return len(sample.response) / args.rollout_max_response_len\n"


@pytest.fixture
def weighing(configure, fake_engine):
    """Start a worker whose reward is a weighted sum, with what follows from it derived as before a run."""
    workers = []

    def start(weights, **values):
        config = derive(configure(rm_type=None, rm_weights=weights, **values))
        workers.append(RolloutWorker(config))
        workers[-1].start(fake_engine().url)
        return workers[-1]

    yield start
    for one in workers:
        one.stop()


def problems(configure, **values):
    return list(check(derive(configure(**{"rm_type": None, **values}))))


def samples_of(worker, rollout_id=0):
    result = worker.generate(rollout_id, "1")
    return result, result["samples"]


def test_a_weighted_sum_is_that_of_its_parts_by_hand(weighing, hook):
    reference = hook(LENGTH.replace("length", "fn"))
    running = weighing({"f1": 1.0, "boxed_f1": -3.0, reference: 0.25}, report_samples=2, rollout_max_response_len=4)
    result, samples = samples_of(running)
    for sample, raw in zip(samples, result["batch"]["raw_reward"], strict=True):
        f1 = f1_score(sample["response"], sample["label"], {})
        length = len(sample["response"]) / 4
        assert sample["reward"] == {"reward": f1 - 3.0 * 0.0 + 0.25 * length, "f1": f1, "boxed_f1": 0.0, "fn": length}
        assert raw == sample["reward"]["reward"]
        # Readers without a key go by the first.
        assert next(iter(sample["reward"])) == "reward"


def test_every_part_is_among_the_metrics_of_rollout_and_evaluation(weighing, hook, prompt_file):
    reference = hook(LENGTH.replace("length", "fn"))
    running = weighing({"f1": 1.0, reference: 0.5}, eval_prompt_data=prompt_file, rollout_max_response_len=2)
    metrics = running.generate(0, "1")["metrics"]
    assert metrics["rollout/reward/fn"] == 0.5
    assert metrics["rollout/reward"] == pytest.approx(metrics["rollout/reward/f1"] + 0.25)
    assert "rollout/reward/reward" not in metrics
    metrics = running.evaluate(0, "1")["metrics"]
    assert metrics["eval/prompts/reward/fn"] == 0.5
    # The engine answers "3", the label of one prompt in five.
    assert metrics["eval/prompts/reward/f1"] == pytest.approx(0.2)
    assert metrics["eval/prompts/reward"] == pytest.approx(0.45)
    assert "eval/prompts/reward/reward" not in metrics


def test_the_parts_of_a_users_own_dict_reward_are_reported_too(worker, hook):
    reference = hook("def fn(args, sample):\n    return {'style': 2.0, 'right': 1.0, 'long': 0.0}\n")
    result = worker(custom_rm_path=reference, rm_type=None, reward_key="right", report_samples=1).generate(0, "1")
    metrics = result["metrics"]
    assert metrics["rollout/reward"] == 1.0
    assert (metrics["rollout/reward/style"], metrics["rollout/reward/long"]) == (2.0, 0.0)
    assert "rollout/reward/right" not in metrics
    assert list(result["samples"][0]["reward"]) == ["right", "style", "long"]


def test_a_part_that_one_sample_lacks_is_an_error_that_names_part_and_sample(worker, hook):
    body = "def fn(args, sample):\n    return {'a': 1.0} if sample.index == 4 else {'a': 1.0, 'b': 2.0}\n"
    running = worker(custom_rm_path=hook(body), rm_type=None, reward_key="a")
    told = r"5 samples have a part 'b', and those of 1 lack it, such as samples \[4\].* let it return 'b': 0\.0 where"
    with pytest.raises(SampleError, match=told):
        running.generate(0, "1")


def test_a_number_beside_dicts_has_no_parts_and_is_no_error(args_of):
    samples = [Sample(reward={"a": 1.0, "b": 4.0}), Sample(reward={"a": 2.0, "b": 2.0}), Sample(reward=0.0)]
    assert reward_parts(samples, "a") == {"b": 3.0}
    assert rollout_metrics(args_of(reward_key="a"), samples)["rollout/reward"] == 1.0
    assert reward_parts([Sample(reward=1.0)], None) == {}


def test_a_weighted_sum_passes_the_kit():
    labels = [make_sample(label=label) for label in ("7", "1/2", ["x", "y"])]
    weights = {"f1": 1.0, "boxed_f1": -0.5}
    assert check_hook("reward", "weighted", rm_weights=weights, reward_key="reward", samples=labels).passed


def test_the_parts_of_a_sample_are_scored_at_the_same_time(weighing, hook):
    body = """
        import threading
        met = threading.Barrier(2)
        def first(args, sample):
            met.wait(20)
            return 1.0
        def second(args, sample):
            met.wait(20)
            return 2.0
    """
    file = hook(textwrap.dedent(body)).rpartition(":")[0]
    running = weighing({f"{file}:first": 1.0, f"{file}:second": 1.0}, rollout_batch_size=1, n_samples_per_prompt=1)
    assert running.generate(0, "1")["batch"]["raw_reward"] == [3.0]


def test_hooks_that_are_parts_appear_in_the_report_and_are_counted_once(weighing, hook):
    reference = hook(LENGTH.replace("length", "fn"))
    running = weighing({"f1": 1.0, reference: 0.5})
    result = running.generate(0, "1")
    whole, part = [line for line in running.report() if line["hook"] == "reward"]
    assert (whole["reference"], whole["calls"]) == ("weighted", 6)
    assert (part["reference"], part["calls"], part["part_of"]) == (reference, 6, "weighted")
    assert part["sha256"]
    assert result["metrics"]["hooks/reward/calls"] == 6


def test_the_driver_hashes_the_parts_so_that_other_code_in_the_rollout_process_is_noticed(configure, weighing, hook):
    reference = hook(LENGTH.replace("length", "fn"))
    config = derive(configure(rm_type=None, rm_weights={"f1": 1.0, reference: 0.5}))
    (row,) = [row for row in check_run(config).hooks if row.part_of]
    assert (row.reference, row.part_of) == (reference, "weighted")
    (part,) = [line for line in weighing({"f1": 1.0, reference: 0.5}).report() if "part_of" in line]
    here = msgspec.to_builtins(row)
    assert differs(here, part) is None
    assert "file hash" in differs(here, {**part, "sha256": "of other code"})


def test_a_class_may_be_a_part_and_is_built_and_closed_once(weighing, hook):
    body = """
        events = []
        class fn:
            def __init__(self, args):
                events.append("built")
            async def __call__(self, args, sample):
                return 1.0
            def close(self):
                events.append("closed")
    """
    reference = hook(textwrap.dedent(body))
    running = weighing({reference: 2.0})
    assert set(running.generate(0, "1")["batch"]["raw_reward"]) == {2.0}
    file = reference.rpartition(":")[0]
    (events,) = (module.events for module in list(sys.modules.values()) if getattr(module, "__file__", None) == file)
    assert events == ["built"]
    running.stop()
    running.stop = lambda: None
    assert events == ["built", "closed"]


def test_a_part_that_raises_now_and_then_is_repeated_with_the_sum(weighing, hook):
    reference = hook(
        "calls = []\ndef fn(args, sample):\n    calls.append(1)\n"
        "    if len(calls) % 3 == 1: raise OSError('flaky')\n    return 1.0\n"
    )
    result = weighing({"f1": 0.0, reference: 1.0}).generate(0, "1")
    assert result["batch"]["raw_reward"] == [1.0] * 6
    assert result["metrics"]["hooks/reward/retries"] >= 1


def test_a_part_that_always_raises_stops_the_run_with_its_own_exception(weighing, hook):
    reference = hook("def fn(args, sample):\n    raise KeyError('no such label')\n")
    with pytest.raises(KeyError, match="no such label") as caught:
        weighing({"f1": 1.0, reference: 1.0}).generate(0, "1")
    assert f"raised by the reward hook {reference}" in "\n".join(caught.value.__notes__)


def test_a_part_that_hangs_is_named(weighing, hook):
    reference = hook("import asyncio\nasync def fn(args, sample):\n    await asyncio.sleep(3600)\n")
    with pytest.raises(HookError, match=f"reward hook {reference} ran past --hook-timeout"):
        weighing({"f1": 1.0, reference: 1.0}, hook_timeout=0.5, hook_error_budget="0").generate(0, "1")


def test_parts_that_wait_for_a_thread_are_not_late(weighing, hook):
    reference = hook("import time\ndef fn(args, sample):\n    time.sleep(0.8)\n    return 1.0\n")
    # 24 calls on 8 threads take 2.4 s.
    running = weighing({reference: 1.0}, hook_timeout=2.0, n_samples_per_prompt=12, hook_error_budget="0")
    assert running.generate(0, "1")["batch"]["raw_reward"] == [1.0] * 24


@pytest.mark.parametrize("value", ["None", "float('inf')", "'good'", "{'a': 1.0}"])
def test_a_part_that_is_no_finite_number_is_named_with_its_sample(weighing, hook, value):
    reference = hook(f"def fn(args, sample):\n    return {value}\n")
    with pytest.raises(HookResultError, match=r"reward hook .*:fn returned .* as a part of the reward of sample \d"):
        weighing({"f1": 1.0, reference: 1.0}).generate(0, "1")


def test_the_reward_a_prompt_names_for_itself_does_not_replace_a_part(weighing, tmp_path):
    file = tmp_path / "named.jsonl"
    file.write_text('{"prompt": "say 3>", "label": "3", "metadata": {"rm_type": "random"}}\n')
    running = weighing({"f1": 2.0}, prompt_data=str(file), rollout_batch_size=1)
    assert running.generate(0, "1")["batch"]["raw_reward"] == [2.0] * 3


def test_the_help_of_rm_type_names_every_kind():
    words = re.findall(r"\w+", field_docs(RewardOptions)["rm_type"])
    assert set(KINDS) <= set(words)


def test_weights_are_read_from_a_run_file_with_hooks_beside_it_and_from_the_command_line(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "mine.py").write_text(LENGTH)
    file = folder / "run.toml"
    file.write_text('[reward]\nrm_weights = {math = 1, "mine.py:length" = -0.5}\n')
    assert parse_run([str(file)]).group(RewardOptions).rm_weights == {"math": 1.0, f"{folder}/mine.py:length": -0.5}
    monkeypatch.chdir(tmp_path)
    words = ["--rm-weights", '{"math": 1, "mine.py:length": -0.5}']
    config = parse_run(words)
    assert config.group(RewardOptions).rm_weights == {"math": 1.0, f"{tmp_path}/mine.py:length": -0.5}
    # What a run writes down is read back as it was.
    file.write_text(config.to_toml())
    assert parse_run([str(file)]).group(RewardOptions) == config.group(RewardOptions)


def test_what_follows_from_the_weights_is_derived_and_shown(configure):
    config = derive(configure(rm_type=None, rm_weights={"math": 1.0, "boxed_f1": -0.5}))
    flat = config.flat()
    assert (flat["custom_rm_path"], flat["reward_key"]) == ("weighted", "reward")
    assert config.sources["reward_key"] == config.sources["custom_rm_path"] == DERIVED
    assert '# reward_key = "reward" follows from the others' in config.to_toml()
    assert "reward: 1 × math + -0.5 × boxed_f1" in notes(config)
    assert not list(check(config))
    own = derive(configure(rm_type=None, rm_weights={"math": 1.0, "f1": 0.0}, reward_key="math"))
    assert own.flat()["reward_key"] == "math"
    assert not list(check(own))


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rm_weights": {"mth": 1.0}}, "--rm-weights 'mth' is neither a built-in reward"),
        ({"rm_weights": {"mth": 1.0}}, "did you mean 'math'"),
        ({"rm_weights": {"weighted": 1.0}}, "--rm-weights 'weighted' is neither"),
        ({"rm_weights": {"f1": math.inf}}, "has the weight inf"),
        ({"rm_weights": {"f1": 1.0}, "rm_type": "math"}, "--rm-type math and --rm-weights are both set"),
        ({"rm_weights": {"f1": 1.0}, "custom_rm_path": "os.path:join"}, "--custom-rm-path and --rm-weights are both"),
        ({"rm_weights": {"f1": 1.0}, "group_rm": True}, "--rm-weights scores sample by sample"),
        ({"rm_weights": {"f1": 1.0}, "reward_key": "math"}, "--reward-key math is not among what --rm-weights gives"),
        ({"rm_weights": {"f1": 1.0}, "eval_reward_key": "m"}, "--eval-reward-key m is not among"),
        ({"rm_weights": {"a.py:f1": 1.0, "f1": 1.0}}, "'f1' would be reported as 'f1', as 'a.py:f1' is"),
        ({"rm_weights": {"a.py:reward": 1.0}}, "would be reported as 'reward', as the weighted sum is"),
        ({"rm_weights": {"nowhere.py:fn": 1.0}}, "there is no file"),
        ({"rm_weights": {"remote_rm": 1.0}}, "pass --rm-url"),
        ({"custom_rm_path": "weighted"}, "--custom-rm-path weighted adds up --rm-weights, and none are set"),
    ],
)
def test_the_check_refuses_weights_that_cannot_work(configure, values, problem):
    assert any(problem in text for text in problems(configure, **values)), problems(configure, **values)


def test_the_check_refuses_a_part_that_does_not_fit_or_brings_options(configure, hook):
    wrong = hook("def fn(args):\n    return 1.0\n")
    assert any("miles calls: reward(args, sample" in text for text in problems(configure, rm_weights={wrong: 1.0}))
    file = hook(
        "import msgspec\nclass O(msgspec.Struct, frozen=True):\n    x: int = 1\n"
        "def brings(args, sample):\n    return 1.0\nbrings.options = O\n"
    ).rpartition(":")[0]
    assert any("brings options" in text for text in problems(configure, rm_weights={f"{file}:brings": 1.0}))


def test_no_thread_of_the_parts_is_left_when_the_run_ends(weighing, hook):
    before = set(threading.enumerate())
    running = weighing({hook(LENGTH.replace("length", "fn")): 1.0})
    running.generate(0, "1")
    running.stop()
    running.stop = lambda: None
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("hook-"):
            thread.join(10)
            assert not thread.is_alive()
