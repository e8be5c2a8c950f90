"""Recorded training batches, and hooks replayed on them."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch

from miles_api.errors import DataError, HookResultError, MilesError
from miles_api.loading.hookset import HookSet
from miles_api.record import RecordedTrainBatch, read_dump
from miles_train.options import ObjectiveOptions
from miles_train.replay import replayers

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, hooked = tiny.make_batch, tiny.make_config, tiny.hooked


@pytest.fixture(scope="module")
def dump(hf_dir, tmp_path_factory):
    """Record two rollouts of a run whose postprocess hook masks tokens."""
    path = str(tmp_path_factory.mktemp("dump") / "train.miles")
    options = hooked(rollout_data_postprocess="mask_first_token")
    config = make_config(hf_dir, options, save_debug_train_data=path, num_steps_per_rollout=1)
    with tiny.Started(config) as trainer:
        for rollout_id in (0, 1):
            trainer.train(rollout_id, make_batch(seed=rollout_id, metadata=[{"k": i} for i in range(16)]))
    return path


def replay(name, function, record, **objective):
    config = make_config("", hooked(**{name: function}), ObjectiveOptions(**objective))
    hook = HookSet(config.args, [name]).one(name)
    return replayers[name](hook, config.args, record)


def test_a_record_holds_the_columns_as_they_were_trained_on(dump, hf_dir):
    batch, found = make_batch(seed=1), read_dump(dump)
    first, second = list(found)
    assert found.damage is None
    assert (found.header.kind, found.header.tokenizer) == ("train", hf_dir)
    assert found.header.config["num_steps_per_rollout"] == 1
    assert (first.rollout_id, second.rollout_id) == (0, 1)
    columns = second.columns
    for name in ("tokens", "response_lengths", "sample_indices", "rewards"):
        assert columns[name] == batch[name]
    assert columns["metadata"][3] == {"k": 3}
    assert columns["loss_masks"][1] == [0.0, *batch["loss_masks"][1][1:]]
    assert (
        [len(a) for a in columns["advantages"]] == [len(a) for a in columns["log_probs"]] == batch["response_lengths"]
    )
    assert columns["advantages"][0] == [batch["rewards"][0]] * batch["response_lengths"][0]


def test_a_trainer_without_the_option_writes_nothing(hf_dir, tmp_path):
    with tiny.Started(make_config(hf_dir, run_dir=str(tmp_path / "run"))) as trainer:
        trainer.train(0, make_batch())
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_continues_records_each_rollout_once(hf_dir, tmp_path):
    config = make_config(hf_dir, save_debug_train_data=str(tmp_path / "train.miles"))
    with tiny.Started(config) as trainer:
        trainer.train(0, make_batch())
        trainer.save(0, str(tmp_path / "saved"))
        trainer.train(1, make_batch())
    with tiny.Started(config) as trainer:
        trainer.load(0, str(tmp_path / "saved"))
        trainer.train(1, make_batch())
        trainer.train(2, make_batch())
    assert [record.rollout_id for record in read_dump(tmp_path / "train.miles")] == [0, 1, 2]


def test_advantages_are_compared_with_the_recorded_ones(dump):
    record = next(iter(read_dump(dump)))
    assert replay("advantage", "advantage_from_log_probs", record)["advantages: samples changed"] == 16
    with pytest.raises(HookResultError, match=r"no_returns in rollout 0: 'returns' must be a list"):
        replay("advantage", "no_returns", record)


def test_a_postprocess_hook_shows_which_columns_it_changes(dump):
    record = next(iter(read_dump(dump)))
    unmasked = sum(map(sum, record.columns["loss_masks"]))
    same = replay("rollout_data_postprocess", "mask_first_token", record)
    assert same == {"unmasked tokens": unmasked, "before": unmasked}
    record.columns["loss_masks"] = [[1.0] * len(mask) for mask in record.columns["loss_masks"]]
    changed = replay("rollout_data_postprocess", "mask_first_token", record)
    assert changed["loss_masks: samples changed"] == 16
    assert changed["unmasked tokens"] < changed["before"] == sum(record.columns["response_lengths"])


def test_importance_weights_act_on_a_stand_in_for_the_loss(dump):
    record = next(iter(read_dump(dump)))
    found = replay("importance_weights", "sample_by_sample_tis", record, tis_clip=1.05)
    masks = [torch.tensor(mask) for mask in record.columns["loss_masks"]]
    losses = [
        -(torch.exp(torch.tensor(p) - torch.tensor(q)).clamp(max=1.05) * torch.tensor(a) * m).sum() / max(m.sum(), 1)
        for p, q, a, m in zip(
            record.columns["log_probs"], record.columns["rollout_log_probs"], record.columns["advantages"], masks,
            strict=True,
        )
    ]  # fmt: skip
    assert found["loss"] == pytest.approx(float(sum(losses)) / 16, abs=1e-6)
    assert found["tokens changed"] == found["unmasked tokens"] == sum(m.sum() for m in masks)
    assert found["my_ratio"] > 0
    del record.columns["rollout_log_probs"]
    with pytest.raises(DataError, match="rollout 0 has no column rollout_log_probs"):
        replay("importance_weights", "sample_by_sample_tis", record)


def test_a_reducer_is_compared_with_the_default(dump):
    record = next(iter(read_dump(dump)))
    record.columns["advantages"] = [[1.0] * len(values) for values in record.columns["advantages"]]
    same = replay("pg_loss_reducer", "plain_reducer", record)
    assert same["loss"] == pytest.approx(same["default reducer"])
    assert same["loss"] == -sum(any(mask) for mask in record.columns["loss_masks"])
    assert replay("pg_loss_reducer", "constant_reducer", record)["loss"] != pytest.approx(same["loss"])


def test_a_loss_hook_says_why_it_cannot_be_replayed():
    with pytest.raises(MilesError, match="it needs the logits of a model"):
        replay("loss", "ppo_loss", RecordedTrainBatch(0, {}))
