"""KL divergence in the loss, and the critic's loss: formulas in plain Python, gradients by finite differences."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from miles_train.loss import kl_divergence, policy_loss, value_loss
from miles_train.options import ObjectiveOptions
from miles_train.reducers import sum_of_sample_mean

DIVERGENCES = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
}
kinds = pytest.mark.parametrize("kind", [*DIVERGENCES, "low_var_kl"])
STEP = 1e-6


@st.composite
def batches(draw, *names):
    """Return ragged columns in float64: empty responses, masked samples, impossible numbers at masked tokens."""
    masks = draw(st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=5))
    rng = random.Random(draw(st.integers(0, 2**16)))
    batch = {"loss_masks": masks}
    for name in names:
        batch[name] = [[rng.uniform(-4, 0) if kept else rng.choice([0.0, -3000.0]) for kept in mask] for mask in masks]
    return {name: [torch.tensor(v, dtype=torch.float64) for v in column] for name, column in batch.items()}


def reducer(batch):
    lengths = [len(mask) for mask in batch["loss_masks"]]
    return sum_of_sample_mean([n + 1 for n in lengths], lengths, batch["loss_masks"])


def mean_over_kept(batch, sample, token_loss):
    """Return the mean of `token_loss(token)` over a sample's unmasked tokens."""
    tokens = [token for token, kept in enumerate(batch["loss_masks"][sample].tolist()) if kept]
    return sum(map(token_loss, tokens)) / max(len(tokens), 1)


def run_policy(batch, **options):
    """Return loss, metrics and gradients of the policy loss on a batch without advantages."""
    current = [values.clone().requires_grad_() for values in batch["current"]]
    zeros = {"advantages": [torch.zeros_like(values) for values in current]}
    loss, metrics = policy_loss(
        ObjectiveOptions(**options), batch | zeros, None, reducer(batch),
        log_probs_and_entropy=lambda logits, entropy: (current, None),
    )  # fmt: skip
    loss.backward()
    return loss.item(), metrics, [values.grad for values in current]


def penalty(batch, sample, kind, unbiased, moved=(None, 0.0)):
    """Return one sample's divergence; `moved` is a token and the change of its log-prob."""
    formula, most = (DIVERGENCES["k3"], 10.0) if kind == "low_var_kl" else (DIVERGENCES[kind], math.inf)

    def of(token):
        current = batch["current"][sample][token].item() + (moved[1] if token == moved[0] else 0.0)
        ratio = math.exp(current - batch["log_probs"][sample][token].item()) if unbiased else 1.0
        return min(ratio * formula(current - batch["ref_log_probs"][sample][token].item()), most)

    return mean_over_kept(batch, sample, of)


@kinds
@settings(deadline=None, max_examples=40)
@given(batches("current", "log_probs", "ref_log_probs"), st.booleans())
def test_the_divergence_in_the_loss_is_its_formula_and_its_gradient_the_slope(kind, batch, unbiased):
    samples = range(len(batch["current"]))
    columns = (torch.cat(batch[name]) for name in ("loss_masks", "current", "log_probs", "ref_log_probs"))
    for kept, current, old, ref in zip(*(column.tolist() for column in columns), strict=True):
        values = [ratio * DIVERGENCES["k3"](current - ref) for ratio in (1.0, math.exp(current - old))] if kept else []
        assume(all(abs(value - 10.0) > 1e-2 for value in values))
    loss, metrics, gradients = run_policy(
        batch, use_kl_loss=True, kl_loss_coef=0.5, kl_loss_type=kind, use_unbiased_kl=unbiased
    )
    expected = sum(penalty(batch, i, kind, unbiased) for i in samples)
    assert metrics["kl_loss"].item() == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert loss == pytest.approx(0.5 * expected, rel=1e-5, abs=1e-6)
    assert metrics["loss"].item() == loss
    assert metrics["pg_loss"].item() == 0.0
    for sample, gradient in zip(samples, gradients, strict=True):
        masked = batch["loss_masks"][sample] == 0
        assert not gradient[masked].any()
        ups, downs = (
            [penalty(batch, sample, kind, unbiased, (t, step)) for t in range(len(masked))] for step in (STEP, -STEP)
        )
        slopes = [0.5 * (up - down) / (2 * STEP) for up, down in zip(ups, downs, strict=True)]
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-6)


def test_a_divergence_with_weight_zero_is_reported_and_changes_nothing():
    batch = {name: [torch.tensor(v)] for name, v in (("loss_masks", [1.0]), ("current", [-1.0]), ("log_probs", [-1.0]))}
    batch["ref_log_probs"] = [torch.tensor([-3.0])]
    loss, metrics, gradients = run_policy(batch, use_kl_loss=True, kl_loss_type="k2")
    assert (loss, gradients[0].item()) == (0.0, 0.0)
    assert metrics["kl_loss"].item() == 2.0
    assert "pg_loss" not in metrics
    assert "kl_loss" not in run_policy(batch)[1]


def test_low_var_kl_stays_within_ten_nats_with_a_gradient_that_is_a_number():
    gaps, weights = torch.tensor([-3000.0, -5.0, 0.0, 5.0, 3000.0]).requires_grad_(), torch.ones(5).requires_grad_()
    for kept in (None, weights):
        values = kl_divergence(gaps, "low_var_kl", kept)
        [slopes] = torch.autograd.grad(values.sum(), gaps, retain_graph=True)
        assert values.tolist() == pytest.approx([10.0, 10.0, 0.0, math.exp(-5) + 4, 10.0])
        assert slopes.tolist() == pytest.approx([0.0, 0.0, 0.0, 1 - math.exp(-5), 0.0])
    assert torch.autograd.grad(values.sum(), weights)[0].tolist() == pytest.approx([0, 0, 0, math.exp(-5) + 4, 0])


def test_close_to_the_reference_the_divergence_does_not_drown_in_rounding():
    gaps = torch.tensor([1e-3, -1e-3])
    assert kl_divergence(gaps, "k3").tolist() == pytest.approx([5e-7, 5e-7], rel=1e-2)
    assert (kl_divergence(torch.linspace(-3, 3, 1001), "k3") >= 0).all()


def mean_gradient(kind, *, unbiased, on_policy):
    """Return the exact mean, over a token drawn from the old policy, of the loss's gradient by the policy's logits;
    and the gradients of KL(policy ‖ reference) and KL(reference ‖ policy)."""
    generator = torch.Generator().manual_seed(0)
    logits, old, reference = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    logits.requires_grad_()
    policy, ref = logits.log_softmax(0), reference.log_softmax(0)
    sampled = policy.detach() if on_policy else old.log_softmax(0)
    # One token of each kind; the reducer weighs them by how often the old policy says them.
    batch = {"loss_masks": [torch.ones(6)], "ref_log_probs": [ref], "log_probs": [sampled]}
    batch["advantages"] = [torch.zeros(6)]
    objective = ObjectiveOptions(use_kl_loss=True, kl_loss_coef=1.0, kl_loss_type=kind, use_unbiased_kl=unbiased)
    loss, _ = policy_loss(
        objective, batch, None, lambda values: (values * sampled.exp()).sum(),
        log_probs_and_entropy=lambda logits, entropy: ([policy], None),
    )  # fmt: skip
    sums = (loss, (policy.exp() * (policy - ref)).sum(), (ref.exp() * (ref - policy)).sum())
    return [torch.autograd.grad(value, logits, retain_graph=True)[0] for value in sums]


@pytest.mark.parametrize("kind", ["k1", "k3"])
@pytest.mark.parametrize("on_policy", [True, False])
def test_weighted_by_the_ratio_the_gradient_is_that_of_the_divergence_on_tokens_of_any_policy(kind, on_policy):
    found, wanted, _ = mean_gradient(kind, unbiased=True, on_policy=on_policy)
    torch.testing.assert_close(found, wanted)
    without, wanted, _ = mean_gradient(kind, unbiased=False, on_policy=on_policy)
    assert (without - wanted).abs().max() > 0.05


def test_on_the_policys_own_tokens_k1_has_no_gradient_k2_the_right_one_and_k3_that_of_the_reverse():
    found, _, _ = mean_gradient("k1", unbiased=False, on_policy=True)
    torch.testing.assert_close(found, torch.zeros_like(found))
    found, wanted, _ = mean_gradient("k2", unbiased=False, on_policy=True)
    torch.testing.assert_close(found, wanted)
    found, _, reverse = mean_gradient("k3", unbiased=False, on_policy=True)
    torch.testing.assert_close(found, reverse)


def run_value(batch, clip):
    values = [v.clone().requires_grad_() for v in batch["current"]]
    objective = ObjectiveOptions(advantage_estimator="ppo", value_clip=clip)
    loss, metrics = value_loss(objective, batch, torch.cat(values), reducer(batch))
    loss.backward()
    return loss.item(), metrics, [v.grad for v in values]


def value_losses(batch, sample, clip, moved=(None, 0.0)):
    """Return a sample's mean loss and the share of its unmasked tokens whose loss clipping decides."""

    def both(token):
        value = batch["current"][sample][token].item() + (moved[1] if token == moved[0] else 0.0)
        old, goal = (batch[name][sample][token].item() for name in ("values", "returns"))
        near = value if clip is None else min(max(value, old - clip), old + clip)
        return 0.5 * (value - goal) ** 2, 0.5 * (near - goal) ** 2

    return (
        mean_over_kept(batch, sample, lambda token: max(both(token))),
        mean_over_kept(batch, sample, lambda token: both(token)[1] > both(token)[0]),
    )


def smooth(batch, clip):
    """Say whether no value lies where the loss has a kink: at the edge of its range, or as far from the return as
    the clipped one."""
    value, old, goal = (torch.cat(batch[name]) for name in ("current", "values", "returns"))
    near = value.clamp(old - clip, old + clip)
    edge = ((value - old).abs() - clip).abs().lt(1e-4) | ((value - goal) + (near - goal)).abs().lt(1e-4) & near.ne(
        value
    )
    return not (edge & (torch.cat(batch["loss_masks"]) != 0)).any()


@pytest.mark.parametrize("clip", [None, 0.2, 1.0])
@settings(deadline=None, max_examples=40)
@given(batches("current", "values", "returns"))
def test_the_value_loss_is_its_formula_and_its_gradient_the_slope(clip, batch):
    samples = range(len(batch["current"]))
    assume(clip is None or smooth(batch, clip))
    loss, metrics, gradients = run_value(batch, clip)
    assert loss == pytest.approx(sum(value_losses(batch, i, clip)[0] for i in samples), rel=1e-5, abs=1e-6)
    assert metrics["value_loss"].item() == loss
    shares = sum(value_losses(batch, i, clip)[1] for i in samples)
    assert metrics["value_clipfrac"].item() == pytest.approx(shares, rel=1e-5, abs=1e-6)
    for sample, gradient in zip(samples, gradients, strict=True):
        masked = batch["loss_masks"][sample] == 0
        assert not gradient[masked].any()
        ups, downs = (
            [value_losses(batch, sample, clip, (t, step))[0] for t in range(len(masked))] for step in (STEP, -STEP)
        )
        slopes = [(up - down) / (2 * STEP) for up, down in zip(ups, downs, strict=True)]
        assert gradient.tolist() == pytest.approx(slopes, rel=1e-4, abs=1e-5)


def test_on_the_first_step_nothing_is_clipped_and_a_value_is_drawn_to_its_return():
    batch = {"loss_masks": [torch.ones(2)], "current": [torch.tensor([1.0, -1.0])], "returns": [torch.zeros(2)]}
    batch["values"] = batch["current"]
    loss, metrics, gradients = run_value(batch, 0.2)
    assert (loss, metrics["value_clipfrac"].item()) == (0.5, 0.0)
    assert gradients[0].tolist() == [0.5, -0.5]


def test_a_value_that_has_moved_far_towards_its_return_stops_and_one_that_moved_away_comes_back():
    batch = {"loss_masks": [torch.ones(2)], "current": [torch.tensor([0.5, -0.5])], "returns": [torch.ones(2)]}
    batch["values"] = [torch.zeros(2)]
    _, metrics, gradients = run_value(batch, 0.2)
    assert metrics["value_clipfrac"].item() == 0.5
    assert gradients[0].tolist() == [0.0, -0.75]
