"""Each estimator against its formula written out sample by sample, on ragged rollouts."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_api.errors import SampleError
from miles_train import advantages as module
from miles_train.advantages import set_advantages, whiten_advantages
from miles_train.estimators import ESTIMATORS, Estimator, with_baselines
from miles_train.objective import samples_that_pull
from miles_train.options import ObjectiveOptions
from miles_train.parallel import Group

REWARDS = st.sampled_from([0.0, 0.1, 1.0, -2.5]) | st.floats(-10, 10, width=32)


@st.composite
def rollouts(draw):
    """Return columns of groups of uneven size in any order: fan-out, removed samples, empty and masked responses."""
    columns = {name: [] for name in ("group_indices", "rollout_ids", "rewards", "loss_masks")}
    for group in range(draw(st.integers(1, 4))):
        for member in range(draw(st.integers(1, 4))):
            for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
                mask = draw(st.lists(st.integers(0, 1), max_size=5))
                columns["group_indices"].append(7 - group)
                columns["rollout_ids"].append(10 * group + member)
                columns["rewards"].append(draw(REWARDS))
                columns["loss_masks"].append([0] * len(mask) if draw(st.integers(0, 4)) == 0 else mask)
    order = draw(st.permutations(range(len(columns["rewards"]))))
    return {name: [column[i] for i in order] for name, column in columns.items()}


def tensors(columns):
    masks = [torch.tensor(mask, dtype=torch.float32) for mask in columns["loss_masks"]]
    return columns | {"loss_masks": masks, "response_lengths": [len(mask) for mask in masks]}


def estimate(name, columns, gamma=1.0):
    """Return the rollout data of one rank that has everything, as the trainer makes it."""
    data = tensors(with_baselines(columns, ESTIMATORS[name]))
    set_advantages(data, ESTIMATORS[name], ObjectiveOptions(gamma=gamma))
    if ESTIMATORS[name].whitens:
        whiten_advantages(data, Group())
    return data


def rollout_means(columns, position):
    """Return the mean rewards of the rollouts of a sample's group: its own, and a list of the others."""
    rows = list(zip(columns["group_indices"], columns["rollout_ids"], columns["rewards"], strict=True))
    group, mine, _ = rows[position]
    others = sorted({r for g, r, _ in rows if g == group and r != mine})
    means = [np.mean([x for g, r, x in rows if (g, r) == (group, rollout)]) for rollout in [mine, *others]]
    return means[0], means[1:]


def whitened(columns, advantages):
    """Return each sample's token values after whitening over the unmasked tokens, as float64 arrays."""
    masks = [np.array(mask) != 0 for mask in columns["loss_masks"]]
    values = [np.broadcast_to(np.float64(a), mask.shape) for a, mask in zip(advantages, masks, strict=True)]
    kept = np.concatenate([v[m] for v, m in zip(values, masks, strict=True)])
    if not len(kept):
        return [np.zeros(mask.shape) for mask in masks]
    scale = np.sqrt(kept.var() + 1e-8)
    return [np.where(m, (v - kept.mean()) / scale, 0.0) for v, m in zip(values, masks, strict=True)]


def assert_tokens(found, expected, masks):
    for values, wanted, mask in zip(found, expected, masks, strict=True):
        assert values.dtype == torch.float32
        assert len(values) == len(mask)
        kept = np.array(mask) != 0
        every = np.broadcast_to(wanted, kept.shape)
        np.testing.assert_allclose(values.numpy()[kept], every[kept], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_grpo_and_gspo_give_every_token_the_reward_as_the_rollout_normalised_it(name):
    data = {"rewards": [1.5, -0.5, 2], "loss_masks": [[1, 1], [], [0, 0, 0]]}
    data = estimate(name, data)
    assert [a.tolist() for a in data["advantages"]] == [[1.5, 1.5], [], [2.0, 2.0, 2.0]]
    assert [a.tolist() for a in data["returns"]] == [[1.5, 1.5], [], [2.0, 2.0, 2.0]]
    assert "baselines" not in data


@settings(deadline=None)
@given(rollouts())
def test_rloo_compares_a_sample_with_the_mean_of_the_other_rollouts_of_its_group(columns):
    data = estimate("rloo", columns)
    expected = []
    for position, reward in enumerate(columns["rewards"]):
        _, others = rollout_means(columns, position)
        expected.append(reward - np.mean(others) if others else 0.0)
    assert_tokens(data["advantages"], expected, columns["loss_masks"])
    assert_tokens(data["returns"], expected, columns["loss_masks"])


@settings(deadline=None)
@given(rollouts(), st.floats(-5, 5, width=32))
def test_rloo_and_the_group_baseline_do_not_mind_rewards_that_the_rollout_has_centred(columns, shift):
    moved = columns | {"rewards": [reward + shift for reward in columns["rewards"]]}
    for name in ("rloo", "reinforce_plus_plus_baseline"):
        expected, found = (with_baselines(some, ESTIMATORS[name])["baselines"] for some in (columns, moved))
        np.testing.assert_allclose(np.array(found) - shift, expected, atol=1e-5)


@settings(deadline=None)
@given(rollouts(), st.sampled_from([1.0, 0.9, 0.5, 0.0]))
def test_reinforce_plus_plus_discounts_by_the_tokens_of_the_model_and_whitens_over_all_of_them(columns, gamma):
    data = estimate("reinforce_plus_plus", columns, gamma)
    returns = []
    for reward, mask in zip(columns["rewards"], columns["loss_masks"], strict=True):
        values, running = np.zeros(len(mask)), reward
        for token in reversed(range(len(mask))):
            if mask[token]:
                values[token], running = running, running * gamma
        returns.append(values)
    assert_tokens(data["returns"], returns, columns["loss_masks"])
    # On the returns as they are, fp32: a spread of nothing but rounding would be blown up otherwise.
    expected = whitened(columns, [values.numpy() for values in data["returns"]])
    assert_tokens(data["advantages"], expected, columns["loss_masks"])


@settings(deadline=None)
@given(rollouts())
def test_reinforce_plus_plus_baseline_subtracts_the_mean_of_the_rollouts_and_whitens(columns):
    data = estimate("reinforce_plus_plus_baseline", columns)
    expected = []
    for position, reward in enumerate(columns["rewards"]):
        mine, others = rollout_means(columns, position)
        expected.append(reward - np.mean([mine, *others]) if others else 0.0)
    assert_tokens(data["returns"], expected, columns["loss_masks"])
    expected = whitened(columns, [values.numpy() for values in data["returns"]])
    assert_tokens(data["advantages"], expected, columns["loss_masks"])


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
@pytest.mark.parametrize("reward", [0.1, 0.7, 1 / 3, -1e5])
def test_where_all_rewards_are_equal_every_advantage_is_exactly_zero(name, reward):
    columns = {"rewards": [reward] * 7, "group_indices": [0, 0, 0, 1, 1, 1, 2]}
    data = estimate(name, columns | {"loss_masks": [[1, 1, 1], [1], [1, 0], [], [1], [1], [1]]})
    assert torch.cat(data["advantages"]).tolist() == [0.0] * 9
    assert not any(samples_that_pull(data))


def test_without_rollout_ids_every_sample_is_a_rollout_of_its_own():
    columns = {"rewards": [1.0, 4.0, 7.0], "group_indices": [0, 0, 0], "loss_masks": [[1]] * 3}
    assert [a.item() for a in estimate("rloo", columns)["advantages"]] == [-4.5, 0.0, 4.5]


def test_a_removed_sample_stays_in_its_groups_baseline_and_leaves_the_whitening():
    columns = {"rewards": [1.0, 4.0, 7.0], "group_indices": [0, 0, 0], "loss_masks": [[1, 1], [1, 1], [0, 0]]}
    assert estimate("rloo", columns)["advantages"][0].tolist() == [-4.5, -4.5]
    data = estimate("reinforce_plus_plus_baseline", columns)
    assert data["returns"][0].tolist() == [-3.0, -3.0]
    assert torch.cat(data["advantages"]).tolist() == pytest.approx([-1, -1, 1, 1, 0, 0], abs=1e-6)


def test_whitening_turns_a_zero_into_a_pull_and_the_mean_into_none():
    columns = {"rewards": [0.0, 2.0, 1.0], "loss_masks": [[1], [1], [1]]}
    assert samples_that_pull(estimate("reinforce_plus_plus", columns)) == [True, True, False]


def test_a_rollout_that_does_not_say_its_groups_is_refused():
    for name in ("rloo", "reinforce_plus_plus_baseline"):
        with pytest.raises(SampleError, match="no column 'group_indices'"):
            with_baselines({"rewards": [1.0]}, ESTIMATORS[name])
    with pytest.raises(SampleError, match="'baselines' is computed by the trainer"):
        with_baselines({"rewards": [1.0], "group_indices": [0], "baselines": [0.0]}, ESTIMATORS["rloo"])


class Ranks:
    """Data-parallel ranks as threads of this process: an `all_gather` that waits for all of them."""

    def __init__(self, size):
        self.size = size
        self._barrier = threading.Barrier(size, timeout=30)
        self._own = threading.local()
        self._slots = [None] * size

    def all_gather(self, gathered, mine, group):
        assert group is self
        self._slots[self._own.rank] = mine
        self._barrier.wait()
        for target, value in zip(gathered, self._slots, strict=True):
            target.copy_(value)
        self._barrier.wait()

    def run(self, shares):
        def whiten(rank, data):
            self._own.rank = rank
            whiten_advantages(data, Group(size=self.size, rank=rank, group=self))

        threads = [threading.Thread(target=whiten, args=(rank, share)) for rank, share in enumerate(shares)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


@settings(deadline=None)
@given(rollouts(), st.integers(2, 4), st.randoms(use_true_random=False))
def test_whitening_over_ranks_is_the_same_however_samples_are_spread(columns, size, rng):
    alone = estimate("reinforce_plus_plus", columns, 0.9)
    data = tensors(columns)
    set_advantages(data, Estimator(discounts=True), ObjectiveOptions(gamma=0.9))
    places = [rng.randrange(size) for _ in columns["rewards"]]
    positions = [[i for i, place in enumerate(places) if place == rank] for rank in range(size)]
    positions = [mine for mine in positions if mine]
    ranks = Ranks(len(positions))
    shares = [{name: [data[name][i] for i in mine] for name in ("advantages", "loss_masks")} for mine in positions]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.dist, "all_gather", ranks.all_gather)
        ranks.run(shares)
    for mine, share in zip(positions, shares, strict=True):
        for i, values in zip(mine, share["advantages"], strict=True):
            torch.testing.assert_close(values, alone["advantages"][i], rtol=1e-6, atol=1e-6)
