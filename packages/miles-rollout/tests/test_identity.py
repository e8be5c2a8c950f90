"""The numbers of fanned-out samples: which of them clash, and which say that samples belong together."""

import pytest

from miles_api.errors import HookResultError

FAN = """
import copy
async def fn(args, sample, sampling_params):
    made = []
    for n in range(2):
        one = copy.copy(sample)
        one.tokens, one.reward = [9], 0.0
        one.append_response_tokens([3], log_probs=[-1.0])
        NUMBERS
        made.append(one)
    return made
"""


@pytest.fixture
def fan(worker, hook):
    """Generate a rollout whose samples fan out into two each, numbered by a line of code; return its columns."""

    def generate(numbers, **options):
        options = {"custom_generate_function_path": hook(FAN.replace("NUMBERS", numbers)), "rm_type": None, **options}
        return worker(**options).generate(0, "1")["batch"]

    return generate


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ("one.rollout_id = 2 * sample.index + n", "index 0 in its rollout_ids 0 and 1: .* an index of its own"),
        ("one.index = one.rollout_id = n", "two generations with index 0, the second in group 0"),
        ("one.index = 10 * sample.index + n; one.rollout_id = n", "two generations with rollout_id 0, .* group 0"),
        ("one.index = one.rollout_id = sample.index + n", "two generations with index 1, the second in group 0"),
    ],
)
def test_fan_outs_that_invent_numbers_which_clash_are_refused_by_them(fan, numbers, problem):
    with pytest.raises(HookResultError, match=problem):
        fan(numbers)


@pytest.mark.parametrize(
    ("numbers", "rollouts"),
    [("pass", 6), ("one.index = 2 * sample.index + n", 6), ("one.index = one.rollout_id = 2 * sample.index + n", 12)],
)
def test_parts_of_one_trajectory_and_trajectories_with_numbers_of_their_own_are_taken(fan, numbers, rollouts):
    assert len(set(fan(numbers)["rollout_ids"])) == rollouts


def test_a_rollout_may_hold_a_copy_of_a_group_that_fanned_out(fan, hook):
    twice = """
import copy
from miles_rollout.own_loop import generate_group
async def fn(args, rollout_id, data_source, evaluation=False):
    group = await generate_group(args, data_source.get_samples(1)[0])
    return [group, copy.deepcopy(group)]
"""
    batch = fan("pass", rollout_function_path=hook(twice))
    assert sorted(batch["sample_indices"]) == [0] * 4 + [1] * 4 + [2] * 4
