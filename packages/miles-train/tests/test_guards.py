"""Guards against NaN and infinity."""

from __future__ import annotations

import pytest
import torch

from miles_api.errors import MilesError
from miles_train.guards import check_finite, check_finite_losses, check_finite_numbers


def test_finite_values_pass_whatever_their_lengths():
    check_finite("log_probs", torch.zeros(3), [3, 0], [7, 8])
    check_finite("log_probs", torch.zeros(0), [], [])
    check_finite_numbers("the reward", [0, 1.5], [7, 8])
    check_finite_losses([torch.tensor(1.0)], [[7, 8]])
    check_finite_losses([], [])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_names_tensor_sample_and_position(value):
    values = torch.tensor([0.0, 0.0, 0.0, value, value])
    message = rf"log_probs of sample 8 in rollout 4 is {value} at position 1 of 3 \(2 such values"
    with pytest.raises(MilesError, match=message):
        check_finite("log_probs", values, [2, 0, 3], [7, 9, 8], " in rollout 4")
    with pytest.raises(MilesError, match=f"the reward of sample 8 is {value}"):
        check_finite_numbers("the reward", [0.0, value], [7, 8])
    with pytest.raises(MilesError, match=f"the loss is {value} for the micro-batch of samples 8, 9"):
        check_finite_losses([torch.tensor(0.0), torch.tensor(value)], [[7], [8, 9]])
