"""Which samples run, what sums are divided by, and how far engine and trainer are apart."""

from __future__ import annotations

import pytest
import torch

from miles_train.metrics import Metrics
from miles_train.objective import add_loss_metrics, logprob_gap, plan_steps, samples_that_pull


def make_data(masks, advantages=None):
    masks = [torch.tensor(mask, dtype=torch.float32) for mask in masks]
    lengths = [len(mask) for mask in masks]
    data = {"loss_masks": masks, "response_lengths": lengths, "total_lengths": [10 - i for i in range(len(masks))]}
    if advantages is not None:
        data["advantages"] = [torch.full((n,), a) for n, a in zip(lengths, advantages, strict=True)]
    return data


def test_a_sample_pulls_if_an_unmasked_token_has_an_advantage():
    assert samples_that_pull(make_data([[1, 1], [0, 0], [], [0, 1], [1]], [0.0, 1.0, 1.0, -0.5, 1e-30])) == [
        False, False, False, True, True,
    ]  # fmt: skip


def test_denominators_count_samples_that_do_not_run_and_metrics_do_not():
    data = make_data([[1, 1], [1, 0], [1, 1], [0, 0]])
    plan = plan_steps(data, [[0, 1], [2, 3]], [True, False, True, True], per_token=False)
    assert [step.positions for step in plan.steps] == [[0], [2, 3]]
    assert [step.loss_denominator for step in plan.steps] == [2, 2]
    assert [step.metric_denominator for step in plan.steps] == [1, 2]
    assert (plan.samples_skipped, plan.steps_skipped) == (1, 0)


def test_per_token_denominators_are_mask_sums_and_never_zero():
    data = make_data([[1, 1], [1, 0], [0, 0]])
    plan = plan_steps(data, [[0, 1], [2]], [True, False, True], per_token=True)
    assert [step.loss_denominator for step in plan.steps] == [3, 1]
    assert [step.metric_denominator for step in plan.steps] == [2, 1]


def test_a_step_in_which_no_sample_runs_anywhere_is_counted_and_empty():
    plan = plan_steps(make_data([[1], [1]]), [[0], [1]], [True, False], per_token=False)
    assert plan.steps[1].positions == []
    assert plan.steps_skipped == 1


def test_a_rank_without_a_running_sample_joins_with_its_shortest_which_counts_in_no_metric():
    data = make_data([[1], [1], [1]])
    other_rank = [[3.0, 3.0, 2.0, 2.0]]
    plan = plan_steps(
        data,
        [[0, 1, 2]],
        [False] * 3,
        per_token=False,
        sum_over_ranks=lambda counts: [[a + b for a, b in zip(counts[0], other_rank[0], strict=True)]],
    )
    [step] = plan.steps
    assert step.positions == [2]
    assert step.loss_denominator == 6
    metrics = Metrics()
    add_loss_metrics(metrics, [{"loss": 0.0, "mine": 5.0, "mine_max": 7.0}], step, loss_weight=1.0, weight=1.0)
    # A sample that no metric's denominator counts adds to none.
    assert metrics.gather(contribute=True) == {"loss": 0.0}


def test_the_gap_ignores_masked_tokens_and_needs_the_engines_log_probs():
    batch = {"loss_masks": [torch.tensor([1.0, 0.0]), torch.tensor([1.0])]}
    trainer = torch.tensor([-1.0, -2.0, -3.0])
    assert logprob_gap(trainer, batch) == {}
    batch["rollout_log_probs"] = [torch.tensor([-1.5, 100.0]), torch.tensor([-2.0])]
    gap = {name: value.item() for name, value in logprob_gap(trainer, batch).items()}
    assert gap == pytest.approx({"logprob_gap_sum": 1.5, "logprob_gap_tokens": 2, "logprob_gap_max": 1.0})
