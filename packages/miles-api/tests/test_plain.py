import array
import math

import pytest

from miles_api import Sample
from miles_api.errors import HookResultError
from miles_api.loading.plain import make_plain, plain_number


class Scalar:
    """Looks like a NumPy or torch scalar, which this package does without."""

    ndim = 0

    def __init__(self, value):
        self.value = value

    def item(self):
        return self.value

    tolist = item


class Tensor:
    """Looks like an array."""

    def __init__(self, *values, ndim=1):
        self.values, self.ndim, self.shape = values, ndim, (len(values),) * ndim

    def tolist(self):
        return list(self.values)

    def item(self):
        if len(self.values) != 1:
            raise ValueError("only one-element tensors")
        return self.values[0]


def plain(**fields):
    sample = Sample(index=3)
    for name, value in fields.items():
        setattr(sample, name, value)
    make_plain(sample, "the reward hook mine.fn")
    return sample


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("tokens", Tensor(1, 2), [1, 2]),
        ("tokens", (1, 2), [1, 2]),
        ("tokens", array.array("i", [1, 2]), [1, 2]),
        ("tokens", [1, Scalar(2)], [1, 2]),
        ("tokens", [Scalar(1), 2], [1, 2]),
        ("loss_mask", Tensor(1.0, 0.0), [1, 0]),
        ("loss_mask", [True, False], [1, 0]),
        ("rollout_log_probs", Tensor(-0.5), [-0.5]),
        ("teacher_log_probs", [0, -1], [0.0, -1.0]),
        ("response_length", Scalar(2), 2),
        ("remove_sample", Scalar(True), True),
        ("non_generation_time", 1, 1.0),
        ("reward", Scalar(0.5), 0.5),
        ("reward", Tensor(0.5), 0.5),
        ("reward", {"a": Scalar(1), "b": 0.5}, {"a": 1.0, "b": 0.5}),
        ("metadata", {"a": Tensor(1, 2), "b": Scalar(1), "c": "x"}, {"a": [1, 2], "b": 1, "c": "x"}),
        ("my_own", Tensor(1, 2), [1, 2]),
    ],
)
def test_scalars_and_arrays_become_plain_values_of_the_fields_type(field, value, expected):
    made = getattr(plain(**{field: value}), field)
    assert made == expected
    assert type(made) is type(expected)
    if isinstance(made, list):
        assert [type(part) for part in made] == [type(part) for part in expected]


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("tokens", Tensor(1, 2, ndim=2), "Tensor of shape (2, 2), not a list of whole numbers"),
        ("tokens", ["a"], "['a'], not a list of whole numbers"),
        ("tokens", "text", "'text', not a list"),
        ("loss_mask", [0.5], "[0.5], not a list of whole numbers"),
        ("response_length", "3", "'3', not one of the whole numbers"),
        ("reward", "good", "'good', not one of the numbers"),
        ("reward", Tensor(1, 2), "of shape (2,), not one of the numbers"),
        ("remove_sample", 2, "2, not one of the truth values"),
    ],
)
def test_what_is_no_number_names_hook_sample_and_field(field, value, shown):
    with pytest.raises(HookResultError) as error:
        plain(**{field: value})
    assert f"the reward hook mine.fn left {field} of sample 3 as" in str(error.value)
    assert shown in str(error.value)


def test_a_sample_that_is_plain_keeps_its_very_lists():
    tokens, mask, log_probs = [1, 2], [1], [-0.5]
    sample = plain(tokens=tokens, loss_mask=mask, rollout_log_probs=log_probs, reward=1.0)
    assert sample.tokens is tokens
    assert sample.loss_mask is mask
    assert sample.rollout_log_probs is log_probs


def test_what_is_no_number_in_metadata_is_left_alone():
    images = Tensor(1, 2, ndim=2)
    assert plain(metadata={"images": images}).metadata["images"] is images


@pytest.mark.parametrize("value", [1, 1.0, True, Scalar(1), Tensor(1)])
def test_a_number_may_come_as_any_scalar(value):
    assert plain_number(value, "the reward hook mine.fn", "the reward of sample 3") == 1.0


@pytest.mark.parametrize("value", ["1", None, math.nan, math.inf, Tensor(1, 2), [1], {}])
def test_what_is_no_finite_number_names_the_hook_and_what_it_was_for(value):
    with pytest.raises(HookResultError, match=r"the reward hook mine\.fn returned .* as the reward of sample 3"):
        plain_number(value, "the reward hook mine.fn", "the reward of sample 3")
