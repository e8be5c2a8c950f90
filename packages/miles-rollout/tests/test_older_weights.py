"""Tokens of older weights than a rollout was asked for: refused, or left out of the loss and counted."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_api.args import Args
from miles_api.errors import ServiceError
from miles_api.sample import Sample
from miles_rollout.older_weights import train_on

KEPT = """
from miles_api.rollout_types import RolloutFnTrainOutput

ANSWERS = {answers!r}

def fn(args, rollout_id, data_source, evaluation=False):
    groups = data_source.get_samples(args.rollout_batch_size)
    for sample in (sample for group in groups for sample in group):
        sample.tokens, sample.reward = [3, 4], 1.0
        for answer in ANSWERS:
            ids = list(range(5, 5 + answer["completion_tokens"]))
            meta = {{"finish_reason": {{"type": "stop"}}, **answer}}
            sample.append_response_tokens(ids, log_probs=[-0.5] * len(ids), meta_info=meta)
            sample.append_response_tokens([9], trainable=False)
    return RolloutFnTrainOutput(samples=groups)
"""
IN_ONE = [{"completion_tokens": 5, "weight_version": "2", "weight_versions": [
    {"version": "1", "start": 0, "end": 3}, {"version": "2", "start": 3, "end": 5}]}]  # fmt: skip
IN_TURNS = [{"completion_tokens": 2, "weight_version": "1"}, {"completion_tokens": 3, "weight_version": "2"}]
ALL_OLD = [{"completion_tokens": 2, "weight_version": "1"}]


@pytest.mark.parametrize(("answers", "mask", "masked"), [
    (IN_ONE, [0, 0, 0, 1, 1, 0], 3),
    (IN_TURNS, [0, 0, 0, 1, 1, 1, 0], 2),
    ([*IN_TURNS, *IN_ONE], [0, 0, 0, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0], 5),
    (ALL_OLD, [0, 0, 0], 2),
    (IN_TURNS[1:], [1, 1, 1, 0], 0),
])  # fmt: skip
def test_tokens_of_older_weights_do_not_train_and_are_counted(worker, hook, answers, mask, masked):
    flags = {"rollout_function_path": hook(KEPT.format(answers=answers)), "rm_type": "f1"}
    made = worker(mask_offpolicy_in_partial_rollout=True, **flags).generate(0, "2")
    samples = len(made["batch"]["loss_masks"])
    assert made["batch"]["loss_masks"] == [mask] * samples
    assert made["metrics"]["rollout/offpolicy_masked_tokens"] == masked * samples


def test_without_the_flag_tokens_of_older_weights_stop_the_run_and_the_message_names_it(worker, hook):
    rollouts = worker(rollout_function_path=hook(KEPT.format(answers=IN_TURNS)), rm_type="f1")
    with pytest.raises(ServiceError, match=r"\['1', '2'\], not '2': .*--mask-offpolicy-in-partial-rollout"):
        rollouts.generate(0, "2")


def test_an_engine_that_does_not_say_where_its_versions_begin_stops_the_run(worker, hook):
    silent = [{"completion_tokens": 2, "weight_version": "1"}, {"completion_tokens": 2, "weight_version": "2"}]
    body = KEPT.format(answers=silent).replace("**answer}", '"weight_version": answer["weight_version"]}')
    rollouts = worker(mask_offpolicy_in_partial_rollout=True, rollout_function_path=hook(body), rm_type="f1")
    with pytest.raises(ServiceError, match=r"cannot tell which tokens are whose"):
        rollouts.generate(0, "2")


_SPANS = st.lists(st.tuples(st.sampled_from("123"), st.integers(0, 3)), min_size=1, max_size=4)


@given(st.lists(st.tuples(_SPANS, st.integers(0, 2)), max_size=4))
def test_whatever_answers_a_sample_is_made_of_each_token_is_known_by_its_version(answers):
    sample, expected = Sample(index=1, tokens=[1]), []
    for spans, tool in answers:
        told, end = [], 0
        for version, count in spans:
            if count:
                told.append({"version": version, "start": end, "end": end + count})
                expected += [int(version == "3")] * count
                end += count
        meta = {"finish_reason": {"type": "stop"}, "weight_version": spans[-1][0], "completion_tokens": end}
        sample.append_response_tokens([2] * end, meta_info={**meta, "weight_versions": told})
        sample.append_response_tokens([7] * tool, trainable=False)
        expected += [0] * tool
    masked = sample.effective_response_length - sum(expected)
    found = train_on(Args({"mask_offpolicy_in_partial_rollout": True}), [sample], "3")
    assert (sample.loss_mask or [1] * sample.response_length) == expected
    assert found == {"rollout/offpolicy_masked_tokens": masked}
