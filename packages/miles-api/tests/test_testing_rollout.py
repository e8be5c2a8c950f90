"""Generations, rollouts and evaluations that lose, repeat or break samples are found."""

import asyncio
import copy
import functools

import pytest

from miles_api import GenerateFnInput, GenerateFnOutput, RolloutFnEvalOutput, RolloutFnTrainOutput, Status
from miles_api.testing import ConformanceError, make_prompt
from miles_api.testing import check_hook as check


def refused(name, fn, **options):
    with pytest.raises(ConformanceError) as caught:
        check(name, fn, **options)
    return caught.value


def generated(sample, *, text="7"):
    sample.tokens = [5, 6]
    sample.append_response_tokens([7], log_probs=[-0.5], text=text)
    sample.status = Status.COMPLETED
    return sample


async def generates(args, sample, sampling_params):
    return generated(sample)


async def fans_out(args, sample, sampling_params):
    twin = copy.deepcopy(sample)
    return [generated(sample), generated(twin)]


def test_generations_pass_in_both_forms_and_fanned_out():
    async def asks(input: GenerateFnInput) -> GenerateFnOutput:
        sample, state = input.sample, input.state
        sample.tokens = state.tokenizer.encode(sample.prompt)
        async with state.generate_fn_semaphore:
            reply = await state.post("/generate", {"input_ids": sample.tokens, "return_logprob": True})
        chosen = reply["meta_info"]["output_token_logprobs"]
        sample.append_response_tokens([e[1] for e in chosen], log_probs=[e[0] for e in chosen], text=reply["text"])
        sample.update_from_meta_info(reply["meta_info"])
        return GenerateFnOutput(samples=sample)

    for fn in (generates, fans_out, asks):
        assert len(check("generate", fn).passed) == 3


async def returns_text(args, sample, sampling_params):
    return "7"


async def returns_nothing(args, sample, sampling_params):
    return []


async def returns_it_twice(args, sample, sampling_params):
    return [generated(sample)] * 2


async def leaves_it_pending(args, sample, sampling_params):
    return sample


async def short_log_probs(args, sample, sampling_params):
    generated(sample).rollout_log_probs = []
    return sample


async def formats_the_prompt(args, sample, sampling_params):
    sample.prompt = f"<user>{sample.prompt}"
    return generated(sample)


async def changes_what_all_share(args, sample, sampling_params):
    sampling_params["stop"].append("###")
    return generated(sample)


async def rewards_with_nan(args, sample, sampling_params):
    generated(sample).reward = float("nan")
    return sample


async def regroups(args, sample, sampling_params):
    made = generated(copy.deepcopy(sample))
    made.group_index = 99
    return made


async def forgets_the_prompt(args, sample, sampling_params):
    generated(sample)
    sample.tokens = sample.tokens[-1:]
    return sample


class KeepsTheLast:
    async def __call__(self, args, sample, sampling_params):
        self.sample = sample
        await asyncio.sleep(0.01)
        return generated(self.sample) if not self.sample.tokens else self.sample


@pytest.mark.parametrize(
    ("fn", "problem", "field"),
    [
        (returns_text, "returned a str, not a Sample", None),
        (returns_nothing, "returned an empty list", None),
        (returns_it_twice, "returned one Sample object twice", None),
        (leaves_it_pending, "is pending and has no response", "status"),
        (short_log_probs, "has 0 entries for 1 response tokens", "rollout_log_probs"),
        (formats_the_prompt, "changed it from 'What is", "prompt"),
        (changes_what_all_share, "which all generations share", "sampling_params"),
        (regroups, "moved the sample to group 99", "group_index"),
        (forgets_the_prompt, "has no prompt token", "tokens"),
        (rewards_with_nan, "not a finite number", "reward"),
        (KeepsTheLast, "was returned for another prompt too", None),
    ],
)
def test_a_generation_that_breaks_its_sample_or_others_is_found(fn, problem, field):
    error = refused("generate", fn)
    assert problem in str(error)
    assert error.field == field


# Rollouts


def rollout(args, rollout_id, data_source, evaluation=False, *, change=None):
    groups = data_source.get_samples(args.rollout_batch_size)
    for group in groups:
        for sample in group:
            generated(sample).reward = 1.0
    if change is not None:
        change(groups)
    return groups


def test_a_bare_list_of_groups_is_a_rollout():
    assert check("rollout", rollout).passed == ["produces a rollout", "produces the next rollout"]


@pytest.mark.parametrize(
    ("change", "problem", "field"),
    [
        (list.pop, "returned 1 groups; --rollout-batch-size is 2", None),
        (lambda groups: setattr(groups[0][0], "reward", None), "was not scored", "reward"),
        (lambda groups: setattr(groups[0][0], "status", Status.PENDING), "is still pending", "status"),
        (lambda groups: setattr(groups[0][0], "group_index", None), "is missing for 1 of 6 samples", "group_index"),
        (lambda groups: groups[1].append(groups[0][0]), "one Sample object in two places", None),
        (lambda groups: setattr(groups[0][0], "loss_mask", [1, 1]), "has 2 entries for 1", "loss_mask"),
        (lambda groups: setattr(groups[0][0], "reward", {"a": 1.0}), "pick one with --reward-key", None),
        (lambda groups: groups[1].clear(), "a list of groups, each a list of Samples", None),
    ],
)
def test_a_rollout_with_a_group_or_sample_that_is_not_finished_is_found(change, problem, field):
    error = refused("rollout", functools.partial(rollout, change=change))
    assert problem in str(error)
    assert error.field == field


@pytest.mark.parametrize(
    ("output", "problem"),
    [
        (None, "returned a NoneType, not RolloutFnTrainOutput"),
        ({"loss": "high"}, "not a finite number"),
        ([1.0], "gave metrics as a list"),
    ],
)
def test_a_rollout_that_returns_something_else_or_metrics_that_are_no_numbers_is_found(output, problem):
    def returns(args, rollout_id, data_source, evaluation=False):
        groups = rollout(args, rollout_id, data_source)
        return None if output is None else RolloutFnTrainOutput(groups, output)

    assert problem in str(refused("rollout", returns))


def test_a_rollout_that_hands_out_samples_again_is_found():
    kept = []

    def the_same(args, rollout_id, data_source, evaluation=False):
        kept.extend(rollout(args, rollout_id, data_source) if not kept else [])
        return kept

    assert "a Sample object of the rollout before" in str(refused("rollout", the_same))


def test_a_rollout_is_evaluated_where_the_options_evaluate():
    def trains_only(args, rollout_id, data_source, evaluation=False):
        assert not evaluation
        return rollout(args, rollout_id, data_source)

    assert check("rollout", trains_only)
    assert "raised AssertionError" in str(refused("rollout", trains_only, eval_interval=2))


@pytest.mark.parametrize(
    ("changes", "problem", "field"),
    [
        ({}, None, None),
        ({"rewards": [1.0]}, "differ in length", None),
        ({"truncated": None}, "dataset math has no list of truncated", None),
        ({"rewards": [1.0, float("inf")]}, "not a finite number", "rewards"),
        (
            {"samples": [make_prompt(), make_prompt(index=1, response_length=3)]},
            "is 3 with 0 tokens",
            "response_length",
        ),
    ],
)
def test_an_evaluation_with_columns_that_do_not_agree_is_found(make_group, changes, problem, field):
    def evaluation(args, rollout_id, data_source, evaluation=True):
        return {"math": {"rewards": [1.0, 0.0], "truncated": [False, False], "samples": make_group(2), **changes}}

    if problem is None:
        assert check("eval_rollout", evaluation).passed == ["evaluates"]
        return
    error = refused("eval_rollout", evaluation)
    assert problem in str(error)
    assert error.field == field


def test_an_evaluation_without_data_or_with_metrics_that_are_no_numbers_is_found():
    assert "returned a list, not RolloutFnEvalOutput" in str(refused("eval_rollout", lambda a, r, d, e: []))
    assert "not a finite number" in str(refused("eval_rollout", lambda a, r, d, e: RolloutFnEvalOutput({}, {"a": "b"})))
