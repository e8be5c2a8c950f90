"""What a trainer lends comes back bit for bit, and is truly gone meanwhile: with all models, and on two ranks."""

from __future__ import annotations

from importlib import import_module

import pytest
import torch
import torch.multiprocessing as mp

from miles_api.errors import ServiceError
from miles_train.options import ModelsOptions, ObjectiveOptions, ParallelOptions
from miles_train.trainer import Trainer
from miles_train.weight_sync.plan import Plan

tiny = import_module("packages.miles-train.tests.tiny_trainer")

# Critic, reference and the policy, each with what it takes to train it.
PPO = ObjectiveOptions(advantage_estimator="ppo", use_kl_loss=True, kl_loss_coef=0.1)
GRPO = ObjectiveOptions()
DATA_PARALLEL = ParallelOptions(actor_num_gpus_per_node=2, use_distributed_optimizer=True)


def _rollouts(trainer, out, *, lending):
    """Train three rollouts with an export after each, lending everything between them or nothing."""
    rows, lent = [], []
    for rollout_id in range(3):
        rows.append(trainer.train(rollout_id, tiny.make_batch(seed=rollout_id)).metrics)
        if lending:
            lent.append(trainer.offload(keep_weights=True)["bytes"])
        # With hashes: what computes them must not tie the memory down.
        trainer.export(f"{out}/{rollout_id}", checksums=True)
        rows.append({"score": trainer.score([[1, 2, 3, 4]])})
        if lending:
            lent.append(trainer.offload()["bytes"])
            assert all(lent)
            assert trainer.onload()["bytes"] == lent[-1] + lent[-2]
    return rows, lent


def _assert_same_files(one, other):
    for rollout_id in range(3):
        name = f"{rollout_id}/model.safetensors"
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_trainer_that_lends_its_memory_learns_the_same_to_the_last_bit(hf_dir, tmp_path):
    results = {}
    for name in ("plain", "lending"):
        with tiny.Started(tiny.make_config(hf_dir, PPO, ModelsOptions(ref_load=hf_dir))) as trainer:
            results[name] = _rollouts(trainer, tmp_path / name, lending=name == "lending")
    assert results["plain"][0] == results["lending"][0]
    _assert_same_files(tmp_path / "plain", tmp_path / "lending")


def test_a_trainer_that_lends_holds_nothing(hf_dir):
    with tiny.Started(tiny.make_config(hf_dir, PPO, ModelsOptions(ref_load=hf_dir))) as trainer:
        trainer.train(0, tiny.make_batch())
        models = trainer._models
        parts = [*models.policy.model, *models.critic.model, *models.reference]
        tensors = [parameter for part in parts for parameter in part.parameters()]
        tensors += [
            buffer.grad_data for part in (*models.policy.model, *models.critic.model) for buffer in part.buffers
        ]
        for trained in (models.policy, models.critic):
            for one in trained.optimizer.inner.chained_optimizers:
                tensors += [state["exp_avg"] for state in one.optimizer.state.values()]
        size = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
        lent = trainer.offload()
        assert all(tensor.untyped_storage().nbytes() == 0 for tensor in tensors)
        # Besides these, the second moments.
        assert lent["bytes"] > size
        trainer.onload()
        assert all(tensor.untyped_storage().nbytes() for tensor in tensors)


def test_what_needs_the_models_says_that_they_are_away(hf_dir, tmp_path):
    with tiny.Started(tiny.make_config(hf_dir)) as trainer:
        trainer.offload(keep_weights=True)
        trainer.export(str(tmp_path / "out"))
        for call in (lambda: trainer.train(0, tiny.make_batch()), lambda: trainer.save(0, str(tmp_path / "save"))):
            with pytest.raises(ServiceError, match="come back with onload"):
                call()
        trainer.offload()
        with pytest.raises(ServiceError, match="come back with onload"):
            trainer.export(str(tmp_path / "out"))
        trainer.onload()
        trainer.train(0, tiny.make_batch())


def test_an_engine_that_starts_anew_in_the_engines_turn_gets_weights_that_are_away(hf_dir, tmp_path):
    plan = Plan(how="tensor", version="3", receivers=[], bucket_bytes=1 << 20, hashed=False, flush=True)
    with tiny.Started(tiny.make_config(hf_dir)) as trainer:
        trainer.train(0, tiny.make_batch())
        trainer.send_weights(plan)
        trainer.export(str(tmp_path / "plain"), weights_only=True)
        trainer.offload()
        assert trainer.snapshot(str(tmp_path / "snapshot"), "3")
        written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "snapshot")]
        assert written[0] == written[1]
        with pytest.raises(ServiceError, match="come back with onload"):
            trainer.export(str(tmp_path / "out"))
        trainer.onload()
        trainer.train(1, tiny.make_batch())
        assert not trainer.snapshot(str(tmp_path / "late"), "3")


def _rank(rank, hf_dir, out, ports):
    for name in ("plain", "lending"):
        trainer = Trainer(tiny.make_config(hf_dir, GRPO, DATA_PARALLEL), **tiny.meeting(rank, ports))
        trainer.start()
        rows, lent = _rollouts(trainer, f"{out}/{name}", lending=name == "lending")
        trainer.save(2, f"{out}/{name}-checkpoint")
        torch.save([rows, lent], f"{out}/{name}-{rank}.pt")
        trainer.stop()


def test_two_ranks_with_a_sharded_optimizer_learn_the_same_when_they_lend(hf_dir, tmp_path):
    context = mp.get_context("spawn")
    mp.spawn(_rank, args=(str(hf_dir), str(tmp_path), context.Queue()), nprocs=2)
    for rank in range(2):
        plain, lending = (torch.load(tmp_path / f"{name}-{rank}.pt") for name in ("plain", "lending"))
        assert plain[0] == lending[0]
        assert all(lending[1])
    _assert_same_files(tmp_path / "plain", tmp_path / "lending")
