"""How token losses become one number: the same gradient and metrics however a batch is split, for every reduction.

A rollout's samples lie on any ranks and in any micro-batches. The model is a linear map from features of a token to its
log-prob; ranks are simulated: each plans on its own, and what they sum over ranks is summed here.
"""

# ruff: noqa: N803  the shape suffixes
# R response tokens, F features

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_train.columns import select
from miles_train.loss import policy_loss
from miles_train.metrics import Metrics
from miles_train.objective import add_loss_metrics, plan_steps, samples_that_pull
from miles_train.options import ObjectiveOptions
from miles_train.reducers import reducer_of
from miles_train.siblings import Siblings, number_rollouts, sum_rollout_masks

FEATURES = 3
LOSSES = {"clip": {}, "cispo": {"policy_loss_type": "cispo"}, "gspo": {"advantage_estimator": "gspo"}}
REDUCTIONS = {"mean": {}, "token": {"calculate_per_token_loss": True}, "constant": {"loss_length_norm": 7.0}}


class Batch(NamedTuple):
    """A rollout, and where each of its samples is trained."""

    columns: dict
    siblings: Siblings | None
    steps: list[int]
    ranks: list[int]
    micro_batches: list[int]


def make_columns(rollouts, seed):
    """Return the columns of rollouts, each given by the loss masks and advantages of its samples."""
    generator = torch.Generator().manual_seed(seed)
    names = ("rollout_ids", "loss_masks", "advantages", "log_probs", "features")
    columns = {name: [] for name in names}
    for rollout, samples in enumerate(rollouts):
        for mask, advantage in samples:
            columns["rollout_ids"].append(rollout)
            columns["loss_masks"].append(torch.tensor(mask, dtype=torch.float32))
            columns["advantages"].append(torch.full((len(mask),), advantage))
            columns["log_probs"].append(torch.randn(len(mask), generator=generator, dtype=torch.float64) - 1)
            columns["features"].append(torch.randn((len(mask), FEATURES), generator=generator, dtype=torch.float64))
    lengths = [len(mask) for mask in columns["loss_masks"]]
    return columns | {"response_lengths": lengths, "total_lengths": [n + 2 for n in lengths]}


MASKS = st.one_of(st.lists(st.integers(0, 1), max_size=5), st.integers(0, 4).map(lambda n: [0] * n))
SAMPLES = st.tuples(MASKS, st.sampled_from([-1.5, -0.5, 0.0, 0.5, 2.0]))


@st.composite
def batches(draw):
    """Any rollouts of one to three samples, on one to three ranks that all have a sample in every step."""
    rollouts = draw(st.lists(st.lists(SAMPLES, min_size=1, max_size=3), min_size=2, max_size=6))
    half = draw(st.sampled_from([len(rollouts) // 2, len(rollouts)]))
    steps = [int(rollout >= half) for rollout, samples in enumerate(rollouts) for _ in samples]
    ranks = min(draw(st.integers(1, 3)), *(steps.count(step) for step in set(steps)))
    places = [steps[:position].count(step) for position, step in enumerate(steps)]
    columns = make_columns(rollouts, draw(st.integers(0, 9)))
    return Batch(
        columns,
        number_rollouts(columns),
        steps,
        [place if place < ranks else draw(st.integers(0, ranks - 1)) for place in places],
        [draw(st.integers(0, 2)) for _ in steps],
    )


def positions_of(values, wanted):
    return [position for position, value in enumerate(values) if value == wanted]


class WaitingError(Exception):
    """A simulated rank came to a sum over ranks that not all ranks have come to yet."""


def plan_together(ranks, objective):
    """Return the plan of each rank; all must come to the same sums over ranks."""
    history = []
    while True:
        asked, plans = [], []
        for data, shares, siblings in ranks:
            known = iter(history)

            def sum_over_ranks(counts, known=known, asked=asked):
                if (total := next(known, None)) is not None:
                    return total
                asked.append(counts)
                raise WaitingError

            running = samples_that_pull(data) if objective.skip_zero_advantage else [True] * len(data["loss_masks"])
            with suppress(WaitingError):
                sum_rollout_masks(data, siblings, sum_over_ranks)
                plans.append(plan_steps(data, shares, running, objective, siblings, sum_over_ranks=sum_over_ranks))
        if not asked:
            return plans
        assert len(asked) == len(ranks)
        rows = [zip(*row, strict=True) for row in zip(*asked, strict=True)]
        history.append([[sum(cell) for cell in row] for row in rows])


def log_probs_of(weights_F, batch):
    return [features @ weights_F for features in batch["features"]]


def loss_of(weights_F, batch, objective, reduce):
    log_probs = log_probs_of(weights_F, batch)
    return policy_loss(objective, batch, None, reduce, log_probs_and_entropy=lambda *_, **__: (log_probs, None))


def trained(batch, objective):
    """Return the gradient of all steps and the metrics, as the trainer makes them of its plan."""
    weights_F = torch.linspace(-0.4, 0.4, FEATURES, dtype=torch.float64).requires_grad_()
    ranks = []
    for rank in sorted(set(batch.ranks)):
        mine = positions_of(batch.ranks, rank)
        shares = [
            [place for place, i in enumerate(mine) if batch.steps[i] == step] for step in sorted(set(batch.steps))
        ]
        siblings = batch.siblings and batch.siblings.of(mine)
        ranks.append((select(batch.columns, mine), shares, siblings))
    metrics = Metrics()
    for rank, plan in enumerate(plan_together(ranks, objective)):
        data, *_ = ranks[rank]
        micro_batches = select({"micro": batch.micro_batches}, positions_of(batch.ranks, rank))["micro"]
        for step in plan.steps:
            packs = defaultdict(list)
            for position in step.positions:
                packs[micro_batches[position]].append(position)
            for pack in packs.values():
                micro = select(data, pack)
                reduce = reducer_of(micro, objective)
                loss, found = loss_of(weights_F, micro, objective, reduce)
                (loss / step.loss_denominator).backward()
                found["ones"] = reduce(torch.ones(sum(micro["response_lengths"])))
                weight = 1 / max(len(plan.steps) - plan.steps_skipped, 1)
                add_loss_metrics(metrics, [found], step, loss_weight=1 / len(plan.steps), weight=weight)
    grad = torch.zeros(FEATURES, dtype=torch.float64) if weights_F.grad is None else weights_F.grad
    return grad, metrics.gather(contribute=True)


def expected(batch, objective):
    """Return the gradient by the formula of docs/algorithms.md, token by token."""
    weights_F = torch.linspace(-0.4, 0.4, FEATURES, dtype=torch.float64).requires_grad_()
    columns = batch.columns
    losses_R, _ = loss_of(weights_F, columns, objective, lambda values_R: values_R)
    losses = losses_R.split(columns["response_lengths"])
    total = 0.0 * weights_F.sum()
    for step in set(batch.steps):
        tokens, sums = defaultdict(float), defaultdict(float)
        for i in positions_of(batch.steps, step):
            rollout, mask = columns["rollout_ids"][i], columns["loss_masks"][i]
            tokens[rollout] += float(mask.sum())
            sums[rollout] = sums[rollout] + (losses[i] * mask).sum()
        if objective.calculate_per_token_loss:
            total = total + sum(sums.values()) / max(sum(tokens.values()), 1)
            continue
        for rollout, value in sums.items():
            total = total + value / (objective.loss_length_norm or max(tokens[rollout], 1)) / len(sums)
    total.backward()
    return weights_F.grad


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(deadline=None, max_examples=40)
@given(batch=batches(), skip=st.booleans())
def test_any_split_into_ranks_and_micro_batches_gives_the_gradient_of_the_formula(loss, reduction, batch, skip):
    objective = ObjectiveOptions(**LOSSES[loss], **REDUCTIONS[reduction], skip_zero_advantage=skip)
    gradient, metrics = trained(batch, objective)
    torch.testing.assert_close(gradient, expected(batch, objective), rtol=1e-6, atol=1e-7)
    count = len(batch.steps)
    _, together = trained(batch._replace(ranks=[0] * count, micro_batches=[0] * count), objective)
    assert metrics == pytest.approx(together, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(deadline=None, max_examples=40)
@given(batch=batches(), skip=st.booleans())
def test_a_metric_that_is_one_at_every_token_is_one_whatever_is_removed_or_left_out(reduction, batch, skip):
    objective = ObjectiveOptions(**REDUCTIONS[reduction], skip_zero_advantage=skip)
    batch = batch._replace(steps=[0] * len(batch.steps))
    rows = zip(batch.columns["loss_masks"], batch.columns["advantages"], strict=True)
    anything = any(bool((mask if not skip else mask * advantage).any()) for mask, advantage in rows)
    _, metrics = trained(batch, objective)
    assert metrics.get("ones", 0.0) == pytest.approx(float(anything), rel=1e-5)


@pytest.mark.parametrize("loss", ["clip", "cispo"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@settings(deadline=None, max_examples=40)
@given(batch=batches())
def test_a_conversation_trains_the_same_as_one_sample_or_as_several(loss, reduction, batch):
    objective = ObjectiveOptions(**LOSSES[loss], **REDUCTIONS[reduction])
    columns = batch.columns
    members = [positions_of(columns["rollout_ids"], rollout) for rollout in sorted(set(columns["rollout_ids"]))]
    tensors = ("loss_masks", "advantages", "log_probs", "features")
    joined = {name: [torch.cat([columns[name][i] for i in own]) for own in members] for name in tensors}
    joined |= {"rollout_ids": list(range(len(members)))}
    joined |= {
        name: [sum(columns[name][i] for i in own) for own in members] for name in ("response_lengths", "total_lengths")
    }
    whole = Batch(joined, None, [batch.steps[own[0]] for own in members], [0] * len(members), [0] * len(members))
    (apart, measured), (together, same) = trained(batch, objective), trained(whole, objective)
    torch.testing.assert_close(apart, together, rtol=1e-6, atol=1e-7)
    assert measured == pytest.approx(same, rel=1e-5, abs=1e-7)
