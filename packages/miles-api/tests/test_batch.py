import pytest

from miles_api.batch import check_columns
from miles_api.errors import SampleError


def batch() -> dict:
    return {
        "tokens": [[1, 2, 3], [4, 5]], "response_lengths": [2, 1], "total_lengths": [3, 2],
        "loss_masks": [[1, 1], [1]], "rewards": [0.5, -0.5], "raw_reward": [1.0, 0.0], "truncated": [0, 0],
        "sample_indices": [7, 8], "rollout_ids": [7, 8], "group_indices": [0, 0],
        "rollout_log_probs": [[-1.0, -1.0], [-1.0]],
    }  # fmt: skip


def test_whole_columns_pass():
    check_columns(batch())


def test_a_column_that_only_some_samples_have_names_those_that_lack_it():
    broken = batch() | {"teacher_log_probs": [[0.0, 0.0], None]}
    with pytest.raises(SampleError, match=r"'teacher_log_probs' is missing for 1 of 2 samples: sample 8"):
        check_columns(broken)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rewards", [0.5], "'rewards' has 1 entries for 2 samples"),
        ("loss_masks", [[1, 1], [1, 1]], r"'loss_masks' has 2 values for a response of 1 tokens \(sample 8\)"),
        ("total_lengths", [3, 3], r"'total_lengths' says 3 for 2 tokens \(sample 8\)"),
        ("response_lengths", [3, 1], r"3 of 3 tokens are the response; at least one token.*\(sample 7\)"),
        (
            "rollout_log_probs",
            [[-1.0], [-1.0]],
            r"'rollout_log_probs' has 1 values for a response of 2 tokens \(sample 7\)",
        ),
        ("custom", 5, "'custom' is a int, not a list"),
        ("tokens", [1, 2], "'tokens' must have a list of numbers for each sample"),
        ("sample_indices", [7], "'sample_indices' has 1 entries for 2 samples"),
    ],
)
def test_a_column_that_does_not_fit_is_named(column, value, message):
    with pytest.raises(SampleError, match=message):
        check_columns(batch() | {column: value})


def test_a_missing_column_is_named():
    broken = batch()
    del broken["truncated"]
    with pytest.raises(SampleError, match="truncated"):
        check_columns(broken)


def test_a_column_of_nothing_counts_as_absent():
    assert check_columns(batch() | {"metadata": [None, None], "teacher_log_probs": None}) == batch()
    with pytest.raises(SampleError, match=r"no column 'truncated'; it has .*tokens"):
        check_columns(batch() | {"truncated": [None, None]})


def test_who_requires_less_is_refused_what_cannot_be_checked_at_all():
    small = {name: batch()[name] for name in ("tokens", "response_lengths", "loss_masks")}
    assert check_columns(small, required=()) == small
    with pytest.raises(SampleError, match="no column 'loss_masks', 'tokens'; it has response_lengths"):
        check_columns({"response_lengths": [1]}, required=())
    with pytest.raises(SampleError, match="missing for 2 of 3 samples: samples 0, 2"):
        check_columns(
            {
                name: column * 3
                for name, column in {"tokens": [[1, 2]], "response_lengths": [1], "loss_masks": [[1]]}.items()
            }
            | {"mine": [None, 5, None]},
            required=(),
        )
