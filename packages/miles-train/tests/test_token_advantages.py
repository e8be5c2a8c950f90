"""Advantages that differ from token to token, by a critic, a reference model or a teacher, against plain loops."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.errors import SampleError
from miles_train.advantages import (
    advantage_metrics,
    finish_advantage_metrics,
    set_advantages,
    whiten_advantages,
)
from miles_train.estimators import ESTIMATORS, with_baselines
from miles_train.gae import generalized_advantages, sums_to_go
from miles_train.needs import whitens
from miles_train.options import ObjectiveOptions
from miles_train.parallel import Group

PER_TOKEN = ("log_probs", "ref_log_probs", "teacher_log_probs", "values")
DIVERGENCES = {
    "k1": lambda d: d,
    "k2": lambda d: d * d / 2,
    "k3": lambda d: math.exp(-d) - 1 + d,
    "low_var_kl": lambda d: min(math.exp(-d) - 1 + d, 10.0),
}
fractions = st.sampled_from([0.0, 0.5, 0.95, 1.0])
kinds = st.sampled_from(sorted(DIVERGENCES))


@st.composite
def rollouts(draw):
    """Return columns as plain lists: groups of uneven size, fan-out, removed samples, empty responses, masked holes
    and, at masked tokens, numbers that must not be used."""
    rng = random.Random(draw(st.integers(0, 2**16)))
    columns = {name: [] for name in ("group_indices", "rollout_ids", "rewards", "loss_masks", *PER_TOKEN)}
    for group in range(draw(st.integers(1, 3))):
        for member in range(draw(st.integers(1, 3))):
            for _ in range(draw(st.sampled_from([1, 1, 2]))):
                mask = draw(st.lists(st.integers(0, 1), max_size=9))
                mask = [0] * len(mask) if draw(st.integers(0, 4)) == 0 else mask
                columns["group_indices"].append(group)
                columns["rollout_ids"].append(10 * group + member)
                columns["rewards"].append(rng.choice([0.0, 1.0, rng.uniform(-3, 3)]))
                columns["loss_masks"].append(mask)
                for name in PER_TOKEN:
                    junk = rng.choice([-300.0, 5.0])
                    columns[name].append([float(np.float32(rng.uniform(-3, 0))) if m else junk for m in mask])
    order = draw(st.permutations(range(len(columns["rewards"]))))
    return {name: [column[i] for i in order] for name, column in columns.items()}


def estimate(columns, **objective):
    """Return the rollout data of one rank that has everything, without whitening."""
    options = ObjectiveOptions(**objective)
    estimator = ESTIMATORS[options.advantage_estimator]
    data = with_baselines(dict(columns), estimator)
    data |= {
        name: [torch.tensor(values, dtype=torch.float32) for values in columns[name]]
        for name in ("loss_masks", *PER_TOKEN)
        if name in columns
    }
    set_advantages(data, estimator, options)
    return data


def actions(columns, sample):
    return [token for token, kept in enumerate(columns["loss_masks"][sample]) if kept]


def divergence(columns, sample, token, kind):
    return DIVERGENCES[kind](columns["log_probs"][sample][token] - columns["ref_log_probs"][sample][token])


def gaps(columns, sample, token):
    return columns["log_probs"][sample][token] - columns["teacher_log_probs"][sample][token]


def assert_sample(found, expected, tokens):
    assert found.dtype == torch.float32
    assert found[tokens].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-5)


@settings(deadline=None)
@given(rollouts(), fractions, fractions, st.sampled_from([0.0, 0.3]), kinds)
def test_ppo_compares_what_follows_a_token_with_the_critics_values(columns, gamma, lambd, coef, kind):
    data = estimate(columns, advantage_estimator="ppo", gamma=gamma, lambd=lambd, kl_coef=coef, kl_loss_type=kind)
    for sample, reward in enumerate(columns["rewards"]):
        tokens, values = actions(columns, sample), columns["values"][sample]
        advantage, following, expected = 0.0, 0.0, []
        for token in reversed(tokens):
            own = reward if token == tokens[-1] else 0.0
            own -= coef * divergence(columns, sample, token, kind)
            advantage = own + gamma * following - values[token] + gamma * lambd * advantage
            following = values[token]
            expected.insert(0, advantage)
        assert_sample(data["advantages"][sample], expected, tokens)
        returns = [a + values[t] for a, t in zip(expected, tokens, strict=True)]
        assert_sample(data["returns"][sample], returns, tokens)


@settings(deadline=None)
@given(rollouts())
def test_with_ppo_a_masked_token_has_advantage_zero_and_its_value_as_return(columns):
    data = estimate(columns, advantage_estimator="ppo", lambd=0.9)
    for sample, mask in enumerate(columns["loss_masks"]):
        masked = [token for token, kept in enumerate(mask) if not kept]
        assert data["advantages"][sample][masked].tolist() == [0.0] * len(masked)
        assert data["returns"][sample][masked].tolist() == [columns["values"][sample][token] for token in masked]


@settings(deadline=None)
@given(rollouts(), st.data())
def test_a_tools_output_changes_nothing_for_the_tokens_around_it(columns, data):
    """To the last bit, wherever masked tokens are put and whatever is at them."""
    longer = {name: list(column) for name, column in columns.items()}
    for sample, mask in enumerate(columns["loss_masks"]):
        places = data.draw(st.lists(st.integers(0, len(mask)), max_size=4))
        for name in ("loss_masks", *PER_TOKEN):
            values = list(columns[name][sample])
            for place in sorted(places, reverse=True):
                values.insert(place, 0 if name == "loss_masks" else 77.0)
            longer[name][sample] = values
    for objective in (
        {"advantage_estimator": "ppo", "gamma": 0.9, "lambd": 0.8, "kl_coef": 0.1},
        {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "kl_coef": 0.1, "use_opd": True},
    ):
        before, after = estimate(columns, **objective), estimate(longer, **objective)
        for name in ("advantages", "returns"):
            for sample in range(len(columns["rewards"])):
                expected = before[name][sample][actions(columns, sample)]
                assert torch.equal(after[name][sample][actions(longer, sample)], expected)


@settings(deadline=None)
@given(
    rollouts(),
    st.sampled_from(["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"]),
    fractions,
    kinds,
)
def test_a_penalty_in_the_reward_is_taken_off_a_token_and_those_before_it(columns, name, gamma, kind):
    """On top of the reward less its baseline, which the penalty leaves as it is."""
    plain = estimate(columns, advantage_estimator=name, gamma=gamma)
    data = estimate(columns, advantage_estimator=name, gamma=gamma, kl_coef=0.3, kl_loss_type=kind)
    discount = gamma if name == "reinforce_plus_plus" else 1.0
    for sample in range(len(columns["rewards"])):
        tokens, running, expected = actions(columns, sample), 0.0, []
        for token in reversed(tokens):
            running = 0.3 * divergence(columns, sample, token, kind) + discount * running
            expected.insert(0, plain["returns"][sample][token].item() - running)
        assert_sample(data["returns"][sample], expected, tokens)
        assert_sample(data["advantages"][sample], expected, tokens)


@settings(deadline=None)
@given(rollouts(), st.sampled_from(sorted(ESTIMATORS)), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_teacher_adds_to_the_advantage_of_a_token_and_not_to_its_return(columns, name, coef):
    plain = estimate(columns, advantage_estimator=name)
    data = estimate(columns, advantage_estimator=name, use_opd=True, opd_kl_coef=coef)
    for sample in range(len(columns["rewards"])):
        tokens = actions(columns, sample)
        assert torch.equal(data["returns"][sample], plain["returns"][sample])
        expected = [plain["advantages"][sample][t].item() - coef * gaps(columns, sample, t) for t in tokens]
        assert_sample(data["advantages"][sample], expected, tokens)


def test_distillation_without_a_teacher_names_the_ways_to_have_one():
    columns = {"rewards": [1.0], "loss_masks": [[1.0]], "log_probs": [[-1.0]]}
    with pytest.raises(SampleError, match=r"'teacher_log_probs'.*--opd-teacher-load, or set `teacher_log_probs`"):
        estimate(columns, use_opd=True)


def test_a_teachers_part_is_whitened_with_the_rest():
    columns = {"rewards": [1.0, 1.0], "loss_masks": [[1.0], [1.0]], "log_probs": [[-1.0], [-1.0]]}
    columns["teacher_log_probs"] = [[-0.5], [-1.5]]
    data = estimate(columns, use_opd=True)
    assert torch.cat(data["advantages"]).tolist() == [1.5, 0.5]
    whiten_advantages(data, Group())
    assert torch.cat(data["advantages"]).tolist() == pytest.approx([1.0, -1.0], abs=1e-6)
    assert torch.cat(data["returns"]).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_whether_advantages_are_whitened_is_the_estimators_choice_unless_the_run_makes_it(name):
    own = name in ("ppo", "reinforce_plus_plus", "reinforce_plus_plus_baseline")
    assert whitens(ObjectiveOptions(advantage_estimator=name)) is own
    for asked in (True, False):
        objective = ObjectiveOptions(advantage_estimator=name, normalize_advantages=asked)
        assert whitens(objective) is asked
        assert whitens(objective, made_by_hook=True) is asked
    assert not whitens(ObjectiveOptions(advantage_estimator=name), made_by_hook=True)


@settings(deadline=None)
@given(rollouts(), st.integers(1, 5), kinds)
def test_what_was_measured_is_the_mean_over_the_unmasked_tokens_of_all_ranks(columns, split, kind):
    objective = ObjectiveOptions(advantage_estimator="rloo", kl_coef=0.1, kl_loss_type=kind, use_opd=True)
    names, totals = ("loss_masks", *PER_TOKEN), {}
    assert advantage_metrics({"loss_masks": [torch.ones(1)]}, ObjectiveOptions()) == {}
    for share in (slice(0, split), slice(split, None)):
        rank = {name: [torch.tensor(values) for values in columns[name][share]] for name in names}
        for name, value in (advantage_metrics(rank, objective) if rank["loss_masks"] else {}).items():
            totals[name] = totals.get(name, 0.0) + value.item()
    places = [(s, t) for s in range(len(columns["rewards"])) for t in actions(columns, s)]
    found = finish_advantage_metrics(totals | {"loss": 2.0})
    if not places:
        assert found == {"loss": 2.0}
        return
    expected = {
        "kl_reward": sum(divergence(columns, s, t, kind) for s, t in places) / len(places),
        "opd_kl": sum(gaps(columns, s, t) for s, t in places) / len(places),
        "loss": 2.0,
    }
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_response_of_65536_tokens_with_holes_is_summed_as_a_loop_sums_it():
    rng = np.random.default_rng(0)
    lengths = [65536, 0, 1, 3000]
    kept, rewards, values = rng.random(sum(lengths)) < 0.7, rng.normal(size=sum(lengths)), rng.normal(size=sum(lengths))
    advantages, sums = np.zeros(sum(lengths)), np.zeros(sum(lengths))
    end = sum(lengths)
    for length in reversed(lengths):
        advantage = following = total = 0.0
        for token in range(end - 1, end - length - 1, -1):
            if kept[token]:
                advantage = rewards[token] + 0.99 * following - values[token] + 0.99 * 0.95 * advantage
                following, total = values[token], rewards[token] + 0.999 * total
                advantages[token], sums[token] = advantage, total
        end -= length
    given_R = [torch.from_numpy(array) for array in (rewards, values, kept)]
    found, returns = generalized_advantages(*given_R, lengths, gamma=0.99, lambd=0.95)
    np.testing.assert_allclose(found.numpy(), advantages, rtol=0, atol=1e-10)
    np.testing.assert_allclose(returns.numpy(), advantages + values, rtol=0, atol=1e-10)
    np.testing.assert_allclose(sums_to_go(given_R[0], given_R[2], lengths, 0.999).numpy(), sums, rtol=0, atol=1e-9)
