"""Each policy loss against its formula written out in plain Python, its gradient against finite differences."""

from __future__ import annotations

import math
import random
from functools import partial

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from miles_train.importance import truncated_importance_sampling
from miles_train.loss import policy_loss
from miles_train.objective import samples_that_pull
from miles_train.options import ObjectiveOptions
from miles_train.reducers import sum_of_sample_mean

LOSSES = {
    "clip": {},
    "clip-higher": {"eps_clip_high": 0.4},
    "dual clip": {"eps_clip_c": 2.0},
    "cispo": {"policy_loss_type": "cispo", "eps_clip_high": 1.0},
    "cispo without lower clip": {"policy_loss_type": "cispo", "eps_clip": 1.0, "eps_clip_high": 0.2},
    "gspo": {"advantage_estimator": "gspo"},
    "gspo with dual clip": {"advantage_estimator": "gspo", "eps_clip_c": 1.5},
}
objectives = pytest.mark.parametrize("objective", [ObjectiveOptions(**o) for o in LOSSES.values()], ids=LOSSES)


@st.composite
def batches(draw, *, one_advantage=False):
    """Return a micro-batch in float64: empty responses, masked samples, impossible old log-probs of masked tokens."""
    masks = draw(st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=5))
    rng = random.Random(draw(st.integers(0, 2**16)))
    batch = {name: [] for name in ("current", "log_probs", "advantages", "loss_masks", "rollout_log_probs")}
    for mask in masks:
        current = [rng.uniform(-4, 0) for _ in mask]
        advantages = [rng.choice([0.0, rng.uniform(-3, 3)]) for _ in mask]
        batch["current"].append(current)
        batch["log_probs"].append(
            [c + rng.uniform(-1.5, 1.5) if m else -300.0 for c, m in zip(current, mask, strict=True)]
        )
        batch["advantages"].append(advantages[:1] * len(mask) if one_advantage else advantages)
        batch["loss_masks"].append(mask)
        batch["rollout_log_probs"].append([rng.uniform(-4, 0) for _ in mask])
    return {name: [torch.tensor(v, dtype=torch.float64) for v in column] for name, column in batch.items()}


def token_losses(objective, current, old, advantages, weights=None):
    """Return the losses of one sample's unmasked tokens, lists of numbers; `weights` are CISPO's, held fixed."""
    low = 1 - objective.eps_clip
    high = 1 + (objective.eps_clip if objective.eps_clip_high is None else objective.eps_clip_high)
    ratios = [math.exp(c - o) for c, o in zip(current, old, strict=True)]
    if objective.advantage_estimator == "gspo" and ratios:
        ratios = [math.exp(sum(c - o for c, o in zip(current, old, strict=True)) / len(ratios))] * len(ratios)
    losses = []
    for token, (ratio, advantage) in enumerate(zip(ratios, advantages, strict=True)):
        bounded = min(max(ratio, low), high)
        if objective.policy_loss_type == "cispo":
            losses.append(-(weights or {}).get(token, bounded) * advantage * current[token])
            continue
        gain = min(ratio * advantage, bounded * advantage)
        if objective.eps_clip_c is not None and advantage < 0:
            gain = max(gain, objective.eps_clip_c * advantage)
        losses.append(-gain)
    return losses


def kept(batch, position, name):
    values, mask = batch[name][position].tolist(), batch["loss_masks"][position].tolist()
    return [value for value, m in zip(values, mask, strict=True) if m]


def sample_loss(objective, batch, position, moved=None, weights=None):
    """Return one sample's mean loss over its unmasked tokens; `moved` is (token, step), a change of a log-prob."""
    current, old, advantages = (kept(batch, position, name) for name in ("current", "log_probs", "advantages"))
    if moved is not None:
        current[moved[0]] += moved[1]
    losses = token_losses(objective, current, old, advantages, weights)
    return sum(losses) / max(len(losses), 1)


def expected_gradient(objective, batch, position, step=1e-6):
    """Return central differences of `sample_loss`; CISPO's weights stay where they are."""
    current, old = kept(batch, position, "current"), kept(batch, position, "log_probs")
    low, high = 1 - objective.eps_clip, 1 + (objective.eps_clip_high or objective.eps_clip)
    weights = {t: min(max(math.exp(c - o), low), high) for t, (c, o) in enumerate(zip(current, old, strict=True))}
    loss = partial(sample_loss, objective, batch, position, weights=weights)
    return [(loss((t, step)) - loss((t, -step))) / (2 * step) for t in range(len(current))]


def smooth(objective, batch):
    """Say whether no ratio lies where the loss has a kink."""
    edges = [1 - objective.eps_clip, 1 + (objective.eps_clip_high or objective.eps_clip), objective.eps_clip_c or 1e9]
    for position in range(len(batch["current"])):
        gaps = [
            c - o for c, o in zip(kept(batch, position, "current"), kept(batch, position, "log_probs"), strict=True)
        ]
        gaps.append(sum(gaps) / max(len(gaps), 1))
        if any(abs(math.exp(gap) - edge) < 1e-4 for gap in gaps for edge in edges):
            return False
    return True


def compute(objective, batch, positions=None, **parts):
    """Return loss, metrics and each sample's gradient of our loss over some samples as one micro-batch."""
    positions = range(len(batch["current"])) if positions is None else positions
    batch = {name: [column[i] for i in positions] for name, column in batch.items()}
    current = [values.clone().requires_grad_() for values in batch["current"]]
    lengths = [len(values) for values in current]
    batch |= {"total_lengths": [n + 1 for n in lengths], "response_lengths": lengths}
    per_token = objective.calculate_per_token_loss
    reduce = sum_of_sample_mean(batch["total_lengths"], lengths, batch["loss_masks"], per_token)
    loss, metrics = policy_loss(
        objective, batch, None, reduce, log_probs_and_entropy=lambda logits, entropy: (current, None), **parts
    )
    loss.backward()
    return loss.item(), metrics, dict(zip(positions, (values.grad for values in current), strict=True))


def tis(batch, pg_loss_R, scored, clip=1.5):  # noqa: N803  the shape suffix
    """Correct as the trainer does, without hooks."""
    options = ObjectiveOptions(tis_clip=clip)
    loss_R, _, metrics = truncated_importance_sampling(
        options, pg_loss=pg_loss_R, train_log_probs=scored, **{n: batch[n] for n in ("rollout_log_probs", "loss_masks")}
    )
    return loss_R, metrics


def reducer(batch):
    """Divide each sample's sum by 7: a stand-in for a reducer hook."""
    return lambda values: torch.where(torch.cat(batch["loss_masks"]) != 0, values, 0.0).sum() / 7


@objectives
@settings(deadline=None, max_examples=50)
@given(batches())
def test_a_loss_is_the_sum_of_the_samples_means_of_its_formula(objective, batch):
    loss, metrics, _ = compute(objective, batch)
    expected = sum(sample_loss(objective, batch, i) for i in range(len(batch["current"])))
    assert loss == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert metrics["loss"].item() == loss


@objectives
@settings(deadline=None, max_examples=50)
@given(batches(one_advantage=True))
def test_a_gradient_is_the_slope_of_the_formula(objective, batch):
    """With one advantage a sample, for which GSPO's formula is of whole responses."""
    assume(smooth(objective, batch))
    _, _, gradients = compute(objective, batch)
    for position, gradient in gradients.items():
        masked = batch["loss_masks"][position] == 0
        assert not gradient[masked].any()
        expected = expected_gradient(objective, batch, position)
        assert gradient[~masked].tolist() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@objectives
@settings(deadline=None, max_examples=30)
@given(batches(), st.lists(st.integers(0, 2), min_size=5, max_size=5), st.booleans(), st.booleans(), st.booleans())
def test_any_split_into_micro_batches_has_the_same_gradient(objective, batch, places, per_token, corrected, reduced):
    changed = {"calculate_per_token_loss": per_token, "use_tis": corrected}
    options = ObjectiveOptions(**{name: getattr(objective, name) for name in objective.__struct_fields__} | changed)
    parts = ({"correct": tis} if corrected else {}) | ({"pg_reducer": reducer} if reduced else {})
    total, _, whole = compute(options, batch, **parts)
    split = 0.0
    for place in set(places[: len(whole)]):
        loss, _, gradients = compute(options, batch, [i for i in whole if places[i] == place], **parts)
        split += loss
        for position, gradient in gradients.items():
            torch.testing.assert_close(gradient, whole[position], rtol=1e-9, atol=1e-9)
    assert split == pytest.approx(total)


@objectives
@settings(deadline=None, max_examples=50)
@given(batches(one_advantage=True), st.booleans())
def test_a_sample_that_does_not_pull_has_no_gradient(objective, batch, corrected):
    parts = {"correct": tis} if corrected else {}
    changed = {name: getattr(objective, name) for name in objective.__struct_fields__} | {"use_tis": corrected}
    loss, _, gradients = compute(ObjectiveOptions(**changed), batch, **parts)
    pulls = samples_that_pull(batch | {"response_lengths": [len(mask) for mask in batch["loss_masks"]]})
    assert not any(gradients[i].any() for i, pulling in enumerate(pulls) if not pulling)
    running = [i for i, pulling in enumerate(pulls) if pulling]
    if running:
        alone, _, _ = compute(ObjectiveOptions(**changed), batch, running, **parts)
        assert alone == pytest.approx(loss)


def one_sample(ratios, advantage):
    logs = [torch.tensor([math.log(r) for r in ratios], dtype=torch.float64)]
    tokens = len(ratios)
    full = {"log_probs": 0.0, "advantages": advantage, "loss_masks": 1.0}
    return {"current": logs} | {name: [torch.full((tokens,), v, dtype=torch.float64)] for name, v in full.items()}


def test_dual_clip_ends_the_pull_of_a_bad_token_that_became_much_likelier():
    batch = one_sample([2.5, 1.5], -1.0)
    assert compute(ObjectiveOptions(), batch)[2][0].tolist() == pytest.approx([1.25, 0.75])
    loss, metrics, gradients = compute(ObjectiveOptions(eps_clip_c=2.0), batch)
    assert gradients[0].tolist() == pytest.approx([0.0, 0.75])
    assert loss == pytest.approx((2.0 + 1.5) / 2)
    assert metrics["pg_clipfrac"].item() == 0.5


def test_cispo_bounds_the_weight_of_a_token_and_lets_it_pull():
    batch = one_sample([2.5, 0.5, 1.0], 1.0)
    assert compute(ObjectiveOptions(), batch)[2][0].tolist() == pytest.approx([0.0, -0.5 / 3, -1 / 3])
    _, metrics, gradients = compute(ObjectiveOptions(policy_loss_type="cispo"), batch)
    assert gradients[0].tolist() == pytest.approx([-1.2 / 3, -0.8 / 3, -1 / 3])
    assert metrics["pg_clipfrac"].item() == pytest.approx(2 / 3)


def test_gspo_clips_a_response_as_a_whole_and_reports_its_ratio():
    """Ratios whose geometric mean is 1.5: GRPO would clip the first token only."""
    batch = one_sample([2.25, 1.0], 1.0)
    _, metrics, gradients = compute(ObjectiveOptions(advantage_estimator="gspo"), batch)
    assert gradients[0].tolist() == [0.0, 0.0]
    assert metrics["ratio_max"].item() == pytest.approx(1.5)
    assert metrics["pg_clipfrac"].item() == 1
    _, _, gradients = compute(ObjectiveOptions(advantage_estimator="gspo", eps_clip=0.6), batch)
    assert gradients[0].tolist() == pytest.approx([-0.75, -0.75])


@settings(deadline=None, max_examples=50)
@given(batches())
def test_with_gspo_a_token_pulls_by_its_own_advantage_weighted_by_the_ratio_of_the_response(batch):
    _, _, gradients = compute(ObjectiveOptions(advantage_estimator="gspo", eps_clip=1.0, eps_clip_high=99.0), batch)
    for position in gradients:
        current, old = kept(batch, position, "current"), kept(batch, position, "log_probs")
        count = max(len(current), 1)
        ratio = math.exp(sum(c - o for c, o in zip(current, old, strict=True)) / count)
        expected = [-ratio * advantage / count for advantage in kept(batch, position, "advantages")]
        assert gradients[position][batch["loss_masks"][position] != 0].tolist() == pytest.approx(expected, abs=1e-6)
