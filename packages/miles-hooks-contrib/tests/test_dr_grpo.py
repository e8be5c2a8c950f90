"""Dr.GRPO's reducer: what a token adds does not depend on which tokens are beside it."""

import pytest

torch = pytest.importorskip("torch")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from miles_api.errors import ConfigError  # noqa: E402
from miles_api.testing import hook_args  # noqa: E402
from miles_hooks_contrib.dr_grpo import ConstantLength  # noqa: E402


def reducer_for(masks, **options):
    args = hook_args(ConstantLength, **options)
    lengths = [len(mask) for mask in masks]
    return ConstantLength(args)(
        [n + 2 for n in lengths], lengths, [torch.tensor(mask, dtype=torch.float32) for mask in masks]
    )


MASKS = st.lists(st.lists(st.integers(0, 1), max_size=6), min_size=1, max_size=8)


@settings(deadline=None, max_examples=60)
@given(masks=MASKS, data=st.data())
def test_any_split_into_micro_batches_gives_the_gradient_of_the_formula(masks, data):
    homes = [data.draw(st.integers(0, 3)) for _ in masks]
    losses = [torch.randn(len(mask), dtype=torch.float64, requires_grad=True) for mask in masks]
    for home in set(homes):
        mine = [i for i, at in enumerate(homes) if at == home]
        reducer_for([masks[i] for i in mine], dr_grpo_length=7.0)(torch.cat([losses[i] for i in mine])).backward()
    for loss, mask in zip(losses, masks, strict=True):
        expected = torch.tensor(mask, dtype=torch.float64) / 7.0
        torch.testing.assert_close(loss.grad if len(mask) else expected, expected)


def test_a_token_weighs_the_same_in_a_long_answer_as_in_a_short_one():
    values = torch.ones(16, requires_grad=True)
    reducer_for([[1] * 12, [1] * 4], dr_grpo_length=8.0)(values).backward()
    assert values.grad.tolist() == [0.125] * 16


def test_the_longest_response_is_the_constant_unless_one_is_given():
    values = torch.ones(3)
    assert reducer_for([[1, 1], [1]], rollout_max_response_len=12)(values) == pytest.approx(0.25)
    assert reducer_for([[1, 1], [1]], rollout_max_response_len=12, dr_grpo_length=6.0)(values) == pytest.approx(0.5)


def test_a_masked_token_adds_nothing_even_if_it_is_infinite():
    values = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    total = reducer_for([[1, 0], [0]], dr_grpo_length=2.0)(values)
    total.backward()
    assert total.item() == pytest.approx(0.5)
    assert values.grad.tolist() == [0.5, 0.0, 0.0]


def test_a_constant_and_a_mean_over_tokens_together_are_refused():
    args = hook_args(ConstantLength, calculate_per_token_loss=True)
    with pytest.raises(ConfigError, match=r"dr_grpo divides by a constant, and --calculate-per-token-loss"):
        ConstantLength(args)
