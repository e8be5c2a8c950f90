import copy
import pickle

import pytest

from miles_api import Sample
from miles_api.errors import ConfigError, SampleError


class Args:
    reward_key = None


def finished() -> Sample:
    return Sample(
        index=3, tokens=[1, 2, 3, 4], response_length=2, response="ab", rollout_log_probs=[-0.1, -0.2], loss_mask=[1, 1]
    )


def test_a_consistent_sample_passes_validation():
    finished().validate()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("response_length", 5),
        ("loss_mask", [1]),
        ("loss_mask", [1, 2]),
        ("rollout_log_probs", [0.0]),
        ("rollout_log_probs", [0.0, float("nan")]),
        ("teacher_log_probs", [0.0, 0.0, 0.0]),
        ("reward", float("nan")),
        ("reward", {"a": float("inf")}),
        ("reward", "good"),
    ],
)
def test_a_sample_that_contradicts_itself_is_refused_by_name_and_field(field, value):
    sample = finished()
    setattr(sample, field, value)
    with pytest.raises(SampleError, match=rf"sample 3.*{field}"):
        sample.validate()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)),
                                  lambda s: Sample.from_dict(s.to_dict())])  # fmt: skip
def test_attributes_beyond_the_fields_survive_every_way_of_copying(twin):
    sample = finished()
    sample.my_note = {"depth": [1, 2]}
    again = twin(sample)
    assert again == sample
    assert again.my_note == {"depth": [1, 2]}


def test_a_deep_copy_shares_nothing():
    sample = finished()
    again = copy.deepcopy(sample)
    again.tokens.append(9)
    again.metadata["x"] = 1
    assert sample.tokens == [1, 2, 3, 4]
    assert sample.metadata == {}


def test_tool_output_is_appended_outside_the_loss():
    sample = Sample(tokens=[1])
    sample.append_response_tokens([2, 3], log_probs=[-1.0, -2.0], text="ab")
    sample.append_response_tokens([4], text="!", trainable=False)
    assert sample.tokens == [1, 2, 3, 4]
    assert sample.response == "ab!"
    assert sample.loss_mask == [1, 1, 0]
    assert sample.rollout_log_probs == [-1.0, -2.0, 0.0]
    assert sample.effective_response_length == 2
    sample.validate()


def test_appending_leaves_a_list_that_somebody_else_holds_alone():
    prompt = [1, 2]
    sample = Sample(tokens=prompt)
    sample.append_response_tokens([3])
    assert prompt == [1, 2]


def test_stripping_tokens_shortens_every_column():
    class Tokenizer:
        def decode(self, ids):
            return "".join(map(str, ids))

    sample = finished()
    sample.strip_last_output_tokens(1, Tokenizer())
    assert (sample.tokens, sample.response_length, sample.response) == ([1, 2, 3], 1, "3")
    sample.validate()
    with pytest.raises(SampleError, match="cannot strip 2"):
        sample.strip_last_output_tokens(2, Tokenizer())


def test_a_retry_starts_from_the_prompt_alone():
    sample = finished()
    sample.reward, sample.status, sample.metadata = 1.0, Sample.Status.COMPLETED, {"kept": True}
    sample.reset_for_retry()
    assert sample == Sample(index=3, tokens=[1, 2], metadata={"kept": True})


def test_a_dict_reward_needs_a_key_that_it_has():
    sample = Sample(index=1, reward={"format": 0.5, "answer": 1.0})
    args = Args()
    with pytest.raises(ConfigError, match="--reward-key"):
        sample.get_reward_value(args)
    args.reward_key = "answr"
    with pytest.raises(ConfigError, match="answer"):
        sample.get_reward_value(args)
    args.reward_key = "answer"
    assert sample.get_reward_value(args) == 1.0


def test_a_missing_reward_is_an_error_and_not_a_zero():
    with pytest.raises(SampleError, match="no reward"):
        Sample(index=1).get_reward_value(Args())


def test_meta_info_sets_status_and_appends_each_new_weight_version_once():
    sample = finished()
    for version in ("1", "1", "2"):
        sample.update_from_meta_info({"finish_reason": {"type": "length"}, "weight_version": version})
    assert sample.status == Sample.Status.TRUNCATED
    assert sample.weight_versions == ["1", "2"]
    assert sample.oldest_weight_version == "1"


def test_a_sample_knows_its_engines_in_order_until_it_is_tried_again_whatever_its_prompt_file_says():
    sample = finished()
    sample.metadata = {"engines": 4}
    for engine in ("a:1", "b:2", "a:1", None):
        sample.update_from_meta_info({"finish_reason": {"type": "stop"}, "engine": engine})
    assert sample.engines == ["a:1", "b:2"]
    sample.reset_for_retry()
    assert sample.engines == []
    assert sample.metadata == {"engines": 4}


def test_an_unknown_finish_reason_is_an_error():
    with pytest.raises(SampleError, match="finish_reason"):
        finished().update_from_meta_info({"finish_reason": None})


def test_an_update_in_the_middle_of_a_request_keeps_both_versions_oldest_first():
    sample = finished()
    spans = [{"version": "1", "start": 0, "end": 4}, {"version": "2", "start": 4, "end": 9}]
    sample.update_from_meta_info({"finish_reason": {"type": "stop"}, "weight_version": "2", "weight_versions": spans})
    assert sample.weight_versions == ["1", "2"]
    assert sample.oldest_weight_version == "1"


def test_generated_tokens_have_log_probs_all_or_none():
    without = Sample(index=1, tokens=[1])
    without.append_response_tokens([2])
    with pytest.raises(SampleError, match="missing for the 1 tokens generated before"):
        without.append_response_tokens([3], log_probs=[-1.0])
    having = Sample(index=1, tokens=[1])
    having.append_response_tokens([2], log_probs=[-1.0])
    with pytest.raises(SampleError, match="gets no entries for 1 generated tokens"):
        having.append_response_tokens([3])


def test_a_response_that_begins_with_tool_output_can_be_generated_on():
    sample = Sample(tokens=[1])
    sample.append_response_tokens([2], trainable=False)
    sample.append_response_tokens([3], log_probs=[-1.0])
    assert (sample.loss_mask, sample.rollout_log_probs) == ([0, 1], [0.0, -1.0])
