"""What a rollout hook of one's own builds on, and what log hooks add to the metrics."""

from pathlib import Path

import pytest

from miles_api import GenerateState
from miles_api.errors import ConfigError, HookResultError
from miles_api.record import read_dump
from miles_api.testing import hook_args
from miles_rollout.own_loop import state_of

OWN = """
import asyncio
from miles_rollout.own_loop import evaluate, generate_group

async def rollout(args, rollout_id, data_source, evaluation=False):
    if evaluation:
        return await evaluate(args)
    groups = data_source.get_samples(args.rollout_batch_size)
    return await asyncio.gather(*(generate_group(args, group) for group in groups))
"""
SCORE = "def fn(args, sample):\n    return float(sample.index)\n"
LOG = "def fn(rollout_id, args, samples, extra, seconds):\n    extra['mine'] = {}\n"


def test_an_own_loop_generates_scores_and_evaluates_with_the_hooks_of_the_run(worker, hook, prompt_file):
    one = worker(
        rollout_function_path=hook(OWN, "rollout"), custom_rm_path=hook(SCORE), rm_type=None,
        eval_prompt_data=prompt_file,
    )  # fmt: skip
    assert one.generate(0, "1")["batch"]["raw_reward"] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert one.evaluate(0, "1")["metrics"]["eval/prompts/reward"] == 2.0


def test_the_default_loop_may_evaluate_for_a_rollout_of_ones_own(worker, hook, prompt_file):
    body = "async def rollout(args, rollout_id, data_source, evaluation=False):\n    assert not evaluation\n"
    one = worker(
        rollout_function_path=hook(body, "rollout"), eval_function_path="inference", custom_rm_path=hook(SCORE),
        rm_type=None, eval_prompt_data=prompt_file,
    )  # fmt: skip
    assert one.evaluate(0, "1")["metrics"]["eval/prompts/reward"] == 2.0


def test_hooks_that_an_own_loop_calls_are_counted_like_those_of_the_default_loop(worker, hook):
    one = worker(rollout_function_path=hook(OWN, "rollout"), custom_rm_path=hook(SCORE), rm_type=None)
    result = one.generate(0, "1")
    assert [line["calls"] for line in result["hooks"] if line["hook"] == "reward"] == [6]
    assert result["metrics"]["hooks/reward/calls"] == 6.0


def test_what_a_hook_raises_in_an_own_loop_ends_the_run_with_the_sample_saved_for_replay(worker, hook, tmp_path):
    reward = hook("def fn(args, sample):\n    return 1 / 0\n")
    one = worker(rollout_function_path=hook(OWN, "rollout"), custom_rm_path=reward, rm_type=None, hook_retries=0)
    with pytest.raises(ZeroDivisionError) as caught:
        one.generate(0, "1")
    assert "miles hooks run" in "\n".join(caught.value.__notes__)
    [saved, *_] = Path(tmp_path, "run", "failed").iterdir()
    assert len(list(read_dump(saved))) == 1


def test_a_state_without_a_model_says_which_option_is_missing():
    with pytest.raises(ConfigError, match="--hf-checkpoint is not set"):
        state_of(hook_args())


def test_a_state_is_not_built_as_in_older_stacks_and_the_error_says_where_it_comes_from():
    with pytest.raises(TypeError, match=r"`input\.state`, .*`miles_rollout\.own_loop\.state_of\(args\)`"):
        GenerateState(hook_args())


def test_what_a_log_hook_adds_is_logged_with_the_built_in_metrics(worker, hook):
    metrics = worker(custom_rollout_log_function_path=hook(LOG.format("samples[0].index + 7"))).generate(0, "1")[
        "metrics"
    ]
    assert metrics["mine"] == 7.0
    assert "rollout/reward" in metrics


@pytest.mark.parametrize("value", ["'seven'", "float('nan')"])
def test_what_a_log_hook_adds_has_to_be_a_number(worker, hook, value):
    with pytest.raises(HookResultError, match="as the metric 'mine', not a finite number"):
        worker(custom_rollout_log_function_path=hook(LOG.format(value))).generate(0, "1")
