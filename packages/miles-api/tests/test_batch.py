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
    with pytest.raises(SampleError, match=r"teacher_log_probs.*\[8\]"):
        check_columns(broken)


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("rewards", [0.5], "rewards has 1 entries for 2 samples"),
        ("loss_masks", [[1, 1], [1, 1]], "sample 8: loss_masks has 2 entries"),
        ("total_lengths", [3, 3], "sample 8"),
        ("response_lengths", [3, 1], "sample 7"),
        ("rollout_log_probs", [[-1.0], [-1.0]], "sample 7: rollout_log_probs"),
        ("custom", 5, "custom has 5"),
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
