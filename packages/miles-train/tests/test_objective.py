"""Which samples run, and what sums are divided by."""

from __future__ import annotations

import pytest
import torch

from miles_train.columns import select
from miles_train.metrics import Metrics
from miles_train.objective import add_loss_metrics, plan_steps, samples_that_pull
from miles_train.options import ObjectiveOptions
from miles_train.reducers import reducer_of
from miles_train.siblings import number_rollouts, sum_rollout_masks

MEANS, TOKENS = ObjectiveOptions(), ObjectiveOptions(calculate_per_token_loss=True)


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


def test_the_loss_is_divided_by_what_does_not_run_or_is_removed_too_and_metrics_are_not():
    data = make_data([[1, 1], [1, 0], [1, 1], [0, 0]])
    plan = plan_steps(data, [[0, 1], [2, 3]], [True, False, True, True], MEANS)
    assert [step.positions for step in plan.steps] == [[0], [2, 3]]
    assert [step.loss_denominator for step in plan.steps] == [2, 2]
    assert [step.metric_denominator for step in plan.steps] == [1, 1]
    assert (plan.samples_skipped, plan.steps_skipped) == (1, 0)


def test_per_token_denominators_are_mask_sums_and_never_zero():
    data = make_data([[1, 1], [1, 0], [0, 0]])
    plan = plan_steps(data, [[0, 1], [2]], [True, False, True], TOKENS)
    assert [step.loss_denominator for step in plan.steps] == [3, 1]
    assert [step.metric_denominator for step in plan.steps] == [2, 1]


def test_a_step_in_which_no_sample_runs_anywhere_is_counted_and_empty():
    plan = plan_steps(make_data([[1], [1]]), [[0], [1]], [True, False], MEANS)
    assert plan.steps[1].positions == []
    assert plan.steps_skipped == 1


def test_a_rank_without_a_running_sample_joins_with_its_shortest_which_counts_in_no_metric():
    data = make_data([[1], [1], [1]])
    other_rank = [[3.0, 2.0, 3.0, 2.0]]
    plan = plan_steps(
        data,
        [[0, 1, 2]],
        [False] * 3,
        MEANS,
        sum_over_ranks=lambda counts: [[a + b for a, b in zip(counts[0], other_rank[0], strict=True)]],
    )
    [step] = plan.steps
    assert step.positions == [2]
    assert step.loss_denominator == 6
    metrics = Metrics()
    add_loss_metrics(metrics, [{"loss": 0.0, "mine": 5.0, "mine_max": 7.0}], step, loss_weight=1.0, weight=1.0)
    # A sample that no metric's denominator counts adds to none.
    assert metrics.gather(contribute=True) == {"loss": 0.0}


def one_rank(sums):
    return sums


def siblings_data():
    """Two rollouts of three and one samples; the first has 4 unmasked tokens in all."""
    data = make_data([[1, 1], [0, 0], [1, 1, 0, 0], [1]])
    siblings = number_rollouts({"rollout_ids": [7, 7, 7, 8], "group_indices": [0] * 4})
    sum_rollout_masks(data, siblings, one_rank)
    return data, siblings


def test_samples_of_one_rollout_count_once_and_share_its_tokens():
    data, siblings = siblings_data()
    [step] = plan_steps(data, [[0, 1, 2, 3]], [True] * 4, MEANS, siblings).steps
    assert data["rollout_mask_sums"] == [4, 4, 4, 1]
    assert (step.loss_denominator, step.metric_denominator) == (2, 2)
    values = torch.arange(9.0)
    assert reducer_of(data, MEANS)(values) == (0 + 1 + 4 + 5) / 4 + 8


def test_ranks_sum_up_the_masks_of_rollouts_once_and_with_room_for_those_of_others():
    siblings, asked = number_rollouts({"rollout_ids": [7, 7, 8, 9]}), []

    def sum_over_ranks(sums):
        asked.append(sums)
        return [[total + 1.0 for total in row] for row in sums]

    data = make_data([[1, 1], [1, 0]])
    sum_rollout_masks(data, siblings.of([1, 3]), sum_over_ranks)
    assert asked == [[[2, 0, 1]]]
    assert data["rollout_mask_sums"] == [3, 2]


def test_a_sample_that_is_left_out_still_counts_in_its_rollouts_tokens():
    data, siblings = siblings_data()
    [step] = plan_steps(data, [[0, 1, 2, 3]], [True, True, False, False], MEANS, siblings).steps
    assert data["rollout_mask_sums"] == [4, 4, 4, 1]
    assert step.loss_denominator == 2
    # Half of the first rollout runs: a metric that is 1 at every token is 1.
    assert step.metric_denominator == 0.5
    assert reducer_of(select(data, step.positions), MEANS)(torch.ones(4)) / step.metric_denominator == 1


def test_a_constant_divides_sums_of_rollouts_and_metrics_stay_means_of_tokens():
    data, siblings = siblings_data()
    objective = ObjectiveOptions(loss_length_norm=10)
    [step] = plan_steps(data, [[0, 1, 2, 3]], [True] * 4, objective, siblings).steps
    reduce = reducer_of(data, objective)
    assert reduce(torch.arange(9.0)) == pytest.approx((0 + 1 + 4 + 5 + 8) / 10)
    assert step.loss_denominator == 2
    assert reduce(torch.ones(9)) / step.metric_denominator == pytest.approx(1)


def test_no_column_is_added_where_no_rollout_has_several_samples():
    columns = {"rollout_ids": [3, 4, 3, 4], "group_indices": [0, 0, 1, 1]}
    siblings = number_rollouts(columns)
    assert siblings is None
    data, asked = make_data([[1], [1]]), []
    sum_rollout_masks(data, siblings, asked.append)
    assert not asked
    assert data.keys() == make_data([[1], [1]]).keys()


def test_parts_of_the_loss_are_divided_as_the_loss_and_shares_of_tokens_as_means():
    data = make_data([[1], [1], [0], [0]])
    [step] = plan_steps(data, [[0, 1, 2, 3]], [True] * 4, MEANS).steps
    metrics = Metrics()
    found = {"loss": 2.0, "pg_loss": 2.0, "value_loss": 2.0, "pg_clipfrac": 2.0}
    add_loss_metrics(metrics, [found], step, loss_weight=1.0, weight=1.0)
    assert metrics.gather(contribute=True) == {"loss": 0.5, "pg_loss": 0.5, "value_loss": 0.5, "pg_clipfrac": 1.0}
