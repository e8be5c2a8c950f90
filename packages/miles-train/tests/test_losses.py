"""Losses and advantages on numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from miles_train.loss import policy_loss, sft_loss
from miles_train.options import ObjectiveOptions
from miles_train.reducers import sum_of_sample_mean


def run_policy(ratios, advantages, masks=None, entropies=None, old=None, **options):
    """Call the policy loss on one sample whose importance ratios are given; return loss, metrics, gradient."""
    log_probs = torch.tensor([math.log(r) for r in ratios]).requires_grad_()
    masks = torch.ones(len(ratios)) if masks is None else torch.tensor(masks)
    old = torch.zeros(len(ratios)) if old is None else torch.tensor(old)
    batch = {"advantages": [torch.tensor(advantages)], "loss_masks": [masks], "log_probs": [old]}

    def stub(logits, entropy=False):
        return [log_probs], [torch.tensor(entropies)] if entropy else None

    reduce = sum_of_sample_mean([len(ratios) + 1], [len(ratios)], [masks], True)
    loss, metrics = policy_loss(ObjectiveOptions(**options), batch, None, reduce, log_probs_and_entropy=stub)
    loss.backward()
    return loss.item(), metrics, log_probs.grad.tolist()


def test_a_ratio_inside_the_clip_range_gives_the_plain_policy_gradient():
    loss, metrics, grad = run_policy([1.1, 0.9], [2.0, -1.0])
    assert loss == pytest.approx(-1.1 * 2.0 + 0.9)
    assert grad == pytest.approx([-1.1 * 2.0, 0.9])
    assert metrics["pg_clipfrac"].item() == 0
    assert metrics["ratio_max"].item() == pytest.approx(1.1)
    assert metrics["ppo_kl"].item() == pytest.approx(-math.log(1.1) - math.log(0.9))


def test_a_clipped_token_stops_pulling_and_is_counted():
    loss, metrics, grad = run_policy([1.5, 0.5, 0.5, 1.5], [1.0, -1.0, 1.0, -1.0])
    assert loss == pytest.approx(-1.2 + 0.8 - 0.5 + 1.5)
    assert grad == pytest.approx([0.0, 0.0, -0.5, 1.5])
    assert metrics["pg_clipfrac"].item() == 2


def test_clip_higher_leaves_more_room_above_one_than_below():
    _, _, grad = run_policy([1.25, 0.75], [1.0, -1.0], eps_clip=0.2, eps_clip_high=0.28)
    assert grad == pytest.approx([-1.25, 0.0])


def test_the_entropy_bonus_lowers_the_loss_and_is_reported_only_when_asked_for():
    plain, metrics, _ = run_policy([1.0], [1.0])
    assert "entropy" not in metrics
    loss, metrics, _ = run_policy([1.0], [1.0], entropies=[0.5], entropy_coef=0.1)
    assert loss == pytest.approx(plain - 0.05)
    assert metrics["entropy"].item() == 0.5
    assert metrics["loss"].item() == pytest.approx(loss)
    assert metrics["pg_loss"].item() == pytest.approx(plain)


def test_the_entropy_can_be_reported_without_a_bonus():
    plain, _, grad = run_policy([1.1], [1.0])
    loss, metrics, same = run_policy([1.1], [1.0], entropies=[0.5], report_entropy=True)
    assert metrics["entropy"].item() == 0.5
    assert (loss, same) == (plain, grad)
    assert "pg_loss" not in metrics


def test_an_impossible_old_log_prob_of_a_masked_token_does_not_reach_loss_or_gradient():
    loss, metrics, grad = run_policy([1.0, 1.0], [1.0, 1.0], masks=[0.0, 1.0], old=[-200.0, 0.0])
    assert loss == -1.0
    assert grad == [0.0, -1.0]
    assert metrics["ratio_max"].item() == 1.0


def test_without_old_log_probs_the_current_ones_serve_and_the_gradient_is_the_advantage():
    log_probs = torch.tensor([-1.0, -2.0]).requires_grad_()
    batch = {"advantages": [torch.tensor([0.5, 0.5])], "loss_masks": [torch.ones(2)]}
    reduce = sum_of_sample_mean([3], [2], batch["loss_masks"], True)
    loss, _ = policy_loss(
        ObjectiveOptions(), batch, None, reduce, log_probs_and_entropy=lambda logits, entropy: ([log_probs], None)
    )
    loss.backward()
    assert log_probs.grad.tolist() == [-0.5, -0.5]


def test_sft_loss_is_the_negative_log_likelihood_of_unmasked_tokens():
    masks = [torch.tensor([1.0, 0.0, 1.0])]
    reduce = sum_of_sample_mean([4], [3], masks)
    loss, metrics = sft_loss(
        ObjectiveOptions(),
        {},
        None,
        reduce,
        log_probs_and_entropy=lambda logits: ([torch.tensor([-1.0, -9.0, -2.0])], None),
    )
    assert loss.item() == metrics["loss"].item() == 1.5
