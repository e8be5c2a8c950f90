"""Every train-side hook is called where its stub says, and what it returns is what is trained on."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from miles_api.errors import SampleError
from miles_api.record import read_dump
from miles_train.metrics import Metrics
from miles_train.mismatch import MISMATCH_METRICS
from miles_train.options import BatchingOptions, ObjectiveOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
make_batch, make_config, train_once = tiny.make_batch, tiny.make_config, tiny.train_once
assert_same_weights, differ = tiny.assert_same_weights, tiny.differ
hooked, calls_of = tiny.hooked, tiny.calls_of


@pytest.fixture(autouse=True)
def _no_calls():
    tiny.forget_calls()


# Loss


@pytest.mark.parametrize("per_token", [False, True])
def test_a_loss_hook_that_writes_out_the_policy_loss_trains_as_the_built_in_one(hf_dir, tmp_path, per_token):
    objective, batch = ObjectiveOptions(calculate_per_token_loss=per_token), make_batch()
    expected, metrics = train_once(make_config(hf_dir, objective), tmp_path / "a", batch)
    own = make_config(hf_dir, objective, hooked(loss="ppo_loss"), loss_type="custom_loss")
    found, own_metrics = train_once(own, tmp_path / "b", batch)
    assert_same_weights(expected, found)
    for name in ("loss", "grad_norm", "pg_clipfrac", "logprob_gap_mean"):
        assert own_metrics[f"train/{name}"] == pytest.approx(metrics[f"train/{name}"], abs=1e-6), name
    assert own_metrics["train/samples"] == pytest.approx(16 / sum(map(sum, batch["loss_masks"])) if per_token else 1)
    [call, _] = calls_of("loss")
    assert {"advantages", "log_probs", "loss_masks", "returns", "rollout_log_probs"} <= set(call["columns"])
    assert [getattr(call["parallel"], name).size for name in ("tp", "pp", "cp", "dp")] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["loss_from_logits", "loss_with_entropy"])
def test_a_loss_hook_may_ask_for_log_probs_never_or_twice(hf_dir, tmp_path, name):
    config = make_config(hf_dir, hooked(loss=name), BatchingOptions(max_tokens_per_gpu=20), loss_type="custom_loss")
    with tiny.Started(config) as trainer:
        losses = [trainer.train(i, make_batch()).metrics["train/loss"] for i in range(5)]
        metrics = trainer.train(5, make_batch()).metrics
    assert losses[-1] < losses[0]
    if name == "loss_with_entropy":
        assert metrics["train/largest_max"] <= math.log(tiny.VOCAB) + 1e-6
        assert 0 < metrics["train/entropy"] < metrics["train/largest_max"]


def test_a_loss_hook_can_train_on_data_without_rewards(hf_dir):
    batch = make_batch()
    del batch["rewards"], batch["rollout_log_probs"]
    options = hooked(loss="loss_with_entropy", before_log_prob="note_log_prob")
    with tiny.Started(make_config(hf_dir, options, loss_type="custom_loss")) as trainer:
        losses = [trainer.train(i, batch).metrics["train/loss"] for i in range(5)]
        assert tiny.stats_of(trainer)["before_log_prob"] == (0, 5, 0)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("objective", "flag"),
    [({"use_opd": True}, "--use-opd"), ({"kl_coef": 0.1, "advantage_estimator": "rloo"}, "--kl-coef")],
)
def test_what_is_a_part_of_advantages_is_refused_on_data_without_rewards(hf_dir, objective, flag):
    batch = make_batch()
    del batch["rewards"]
    options = ObjectiveOptions(**objective), hooked(loss="loss_with_entropy")
    config = make_config(hf_dir, *options, loss_type="custom_loss")
    with (
        tiny.Started(config) as trainer,
        pytest.raises(SampleError, match=f"^{flag} is a part of advantages, which --loss-type custom_loss has only"),
    ):
        trainer.train(0, batch)


def test_a_loss_hook_gets_samples_without_advantage_too(hf_dir, tmp_path):
    batch = make_batch(dead_groups=(0, 1, 2, 3))
    objective = ObjectiveOptions(skip_zero_advantage=True)
    config = make_config(hf_dir, objective, hooked(loss="loss_with_entropy"), loss_type="custom_loss")
    _, metrics = train_once(config, tmp_path, batch)
    assert metrics["train/samples_skipped"] == metrics["train/skipped_steps"] == 0
    assert metrics["train/grad_norm"] > 0


# Reducer


@pytest.mark.parametrize("per_token", [False, True])
def test_a_reducer_hook_equal_to_the_default_gives_identical_numbers(hf_dir, tmp_path, per_token):
    objective, batch = ObjectiveOptions(calculate_per_token_loss=per_token, entropy_coef=0.01), make_batch()
    expected, metrics = train_once(make_config(hf_dir, objective), tmp_path / "a", batch)
    config = make_config(hf_dir, objective, hooked(pg_loss_reducer="plain_reducer"))
    found, own_metrics = train_once(config, tmp_path / "b", batch)
    assert_same_weights(expected, found)
    assert own_metrics == pytest.approx(metrics, abs=1e-6)
    first, second = calls_of("pg_loss_reducer")
    assert first["masks"] + second["masks"] == batch["loss_masks"]
    assert first["per_token"] is per_token


def test_a_reducer_hook_reduces_the_policy_loss_and_not_the_entropy(hf_dir, tmp_path):
    objective = ObjectiveOptions(entropy_coef=0.01)
    plain = train_once(make_config(hf_dir, objective, num_steps_per_rollout=1), tmp_path / "a", make_batch())
    config = make_config(hf_dir, objective, hooked(pg_loss_reducer="constant_reducer"), num_steps_per_rollout=1)
    found = train_once(config, tmp_path / "b", make_batch())
    assert differ(plain[0], found[0])
    assert found[1]["train/pg_loss"] != pytest.approx(plain[1]["train/pg_loss"], rel=0.1)
    assert found[1]["train/entropy"] == pytest.approx(plain[1]["train/entropy"])


# Importance weights


def test_truncated_importance_sampling_changes_nothing_where_trainer_and_engine_agree(hf_dir, tmp_path):
    batch = make_batch()
    with tiny.Started(make_config(hf_dir, hooked(advantage="advantage_from_log_probs"))) as trainer:
        data, *_ = trainer._learner._load_batch(batch)
        passes = trainer._learner._passes
        current = passes.old_log_probs(trainer._model, passes.pack(data, range(16)), Metrics())["log_probs"]
        batch["rollout_log_probs"] = [values.tolist() for values in current]
    plain, metrics = train_once(make_config(hf_dir), tmp_path / "a", batch)
    found, own = train_once(make_config(hf_dir, ObjectiveOptions(use_tis=True)), tmp_path / "b", batch)
    assert_same_weights(plain, found)
    assert own["train/loss"] == pytest.approx(metrics["train/loss"], abs=1e-6)
    assert own["train/tis"] == pytest.approx(1, abs=1e-5)
    assert own["train/tis_clipfrac"] == 0


@pytest.mark.parametrize("steps", [1, 2])
def test_the_built_in_correction_is_the_one_written_out_sample_by_sample(hf_dir, tmp_path, steps):
    """With one step the current log-probs serve, detached; with two the recomputed ones."""
    batch = make_batch()
    batch["rollout_log_probs"][2][0] = -9.0
    objective = ObjectiveOptions(use_tis=True, tis_clip=1.1, tis_clip_low=0.9)
    plain, _ = train_once(make_config(hf_dir, num_steps_per_rollout=steps), tmp_path / "plain", batch)
    built_in = make_config(hf_dir, objective, num_steps_per_rollout=steps)
    own = make_config(hf_dir, objective, hooked(importance_weights="sample_by_sample_tis"), num_steps_per_rollout=steps)
    expected, metrics = train_once(built_in, tmp_path / "a", batch)
    found, own_metrics = train_once(own, tmp_path / "b", batch)
    assert_same_weights(expected, found)
    assert differ(plain, found)
    assert own_metrics["train/my_ratio"] == pytest.approx(metrics["train/tis"], rel=1e-5)
    assert own_metrics["train/my_ratio_max"] > own_metrics["train/my_ratio"] > 1
    assert 0 < metrics["train/tis_clipfrac"] < 1


def test_mismatch_metrics_alone_leave_the_loss_as_it_is(hf_dir, tmp_path):
    batch = make_batch()
    plain, _ = train_once(make_config(hf_dir), tmp_path / "a", batch)
    config = make_config(
        hf_dir, ObjectiveOptions(get_mismatch_metrics=True), hooked(importance_weights="drop_likely_tokens")
    )
    found, metrics = train_once(config, tmp_path / "b", batch)
    assert_same_weights(plain, found, atol=0)
    assert 0 < metrics["train/kept"] < 1


def test_masks_that_a_correction_returns_do_not_change_denominators(hf_dir, tmp_path):
    """Dropping tokens from the masks is the same as a loss of 0 there, not the same as masking them."""
    batch = make_batch()
    options = {"num_steps_per_rollout": 1}
    config = make_config(
        hf_dir, ObjectiveOptions(use_tis=True), hooked(importance_weights="drop_likely_tokens"), **options
    )
    found, metrics = train_once(config, tmp_path / "a", batch)
    with tiny.Started(make_config(hf_dir)) as trainer:
        data, *_ = trainer._learner._load_batch(batch)
        passes = trainer._learner._passes
        current = passes.old_log_probs(trainer._model, passes.pack(data, range(16)), Metrics())["log_probs"]
    kept = [values <= -3.5 for values in current]
    masks = [torch.tensor(mask) for mask in batch["loss_masks"]]
    expected = sum(
        -reward * (mask * keep).sum() / max(mask.sum(), 1)
        for reward, mask, keep in zip(batch["rewards"], masks, kept, strict=True)
    )
    assert metrics["train/loss"] == pytest.approx(float(expected) / 16, abs=1e-6)
    masked = batch | {"loss_masks": [(mask * keep).tolist() for mask, keep in zip(masks, kept, strict=True)]}
    assert differ(found, train_once(make_config(hf_dir, **options), tmp_path / "b", masked)[0])


def test_a_reducer_hook_gets_the_original_masks_also_after_a_correction_that_changed_them_in_place(hf_dir, tmp_path):
    objective, dropped = ObjectiveOptions(use_tis=True), {"importance_weights": "drop_likely_tokens"}
    expected, _ = train_once(make_config(hf_dir, objective, hooked(**dropped)), tmp_path / "a", make_batch())
    both = make_config(hf_dir, objective, hooked(**dropped, pg_loss_reducer="plain_reducer"))
    assert_same_weights(expected, train_once(both, tmp_path / "b", make_batch())[0])


@pytest.mark.parametrize(
    "functions",
    [
        {"pg_loss_reducer": "constant_reducer"},
        {"importance_weights": "drop_likely_tokens"},
        {"importance_weights": "sample_by_sample_tis", "pg_loss_reducer": "plain_reducer"},
    ],
)
def test_the_size_of_micro_batches_does_not_matter_to_hooks(hf_dir, tmp_path, functions):
    objective = ObjectiveOptions(use_tis="importance_weights" in functions, calculate_per_token_loss=True)
    results = [
        train_once(
            make_config(hf_dir, objective, hooked(**functions), BatchingOptions(max_tokens_per_gpu=tokens)),
            tmp_path / str(tokens),
            make_batch(),
        )
        for tokens in (8192, 20)
    ]
    assert_same_weights(results[0][0], results[1][0])
    few, many = (tiny.pop_packing(metrics) for _, metrics in results)
    assert few < many
    assert results[0][1] == pytest.approx(results[1][1], abs=1e-5)


def test_a_correction_without_the_engines_log_probs_names_the_samples(hf_dir):
    with (
        tiny.Started(make_config(hf_dir, ObjectiveOptions(use_tis=True))) as trainer,
        pytest.raises(SampleError, match=r"--use-tis needs .*'rollout_log_probs'.*samples 100, 101, .* …"),
    ):
        trainer.train(0, make_batch(rollout_log_probs=None))


# Columns


@pytest.mark.parametrize("per_token", [False, True])
def test_masks_changed_after_advantages_count_in_denominators(hf_dir, tmp_path, per_token):
    objective, batch = ObjectiveOptions(calculate_per_token_loss=per_token), make_batch()
    config = make_config(hf_dir, objective, hooked(rollout_data_postprocess="mask_first_token"))
    found, metrics = train_once(config, tmp_path / "a", batch)
    masks = [
        [0] * len(mask) if index % 5 == 0 else [0, *mask[1:]]
        for index, mask in zip(batch["sample_indices"], batch["loss_masks"], strict=True)
    ]
    expected, expected_metrics = train_once(
        make_config(hf_dir, objective), tmp_path / "b", batch | {"loss_masks": masks}
    )
    assert_same_weights(expected, found)
    # The mismatch is measured where log-probs are first computed: here before the masks changed.
    metrics, expected_metrics = (
        {name: value for name, value in numbers.items() if name.removeprefix("train/") not in MISMATCH_METRICS}
        for numbers in (metrics, expected_metrics)
    )
    assert metrics == pytest.approx(expected_metrics, abs=1e-6)
    [call] = calls_of("rollout_data_postprocess")
    assert call["rollout_id"] == 0
    assert {"advantages", "returns", "log_probs", "loss_masks", "tokens"} <= set(call["columns"])
    assert {call[name].dtype for name in ("advantages", "log_probs", "loss_masks")} == {torch.float32}
    assert len(call["log_probs"]) == len(call["advantages"]) == batch["response_lengths"][0]


def test_advantages_are_whitened_over_the_masks_that_a_hook_left(hf_dir, tmp_path):
    objective = ObjectiveOptions(advantage_estimator="reinforce_plus_plus", gamma=0.9)
    record, batch = str(tmp_path / "train.miles"), make_batch()
    options = hooked(rollout_data_postprocess="mask_first_token")
    with tiny.Started(make_config(hf_dir, objective, options, save_debug_train_data=record)) as trainer:
        trainer.train(0, batch)
    [columns] = [one.columns for one in read_dump(record)]
    assert columns["loss_masks"] != batch["loss_masks"]
    masks, values, returns = (
        torch.cat([torch.tensor(v) for v in columns[name]]) for name in ("loss_masks", "advantages", "returns")
    )
    kept = values[masks != 0]
    assert kept.mean().item() == pytest.approx(0, abs=1e-6)
    assert kept.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    assert not values[masks == 0].any()
    # The hook itself saw them as the estimator left them.
    [call] = calls_of("rollout_data_postprocess")
    torch.testing.assert_close(call["advantages"], torch.tensor(columns["returns"][0]))
    assert returns.abs().max() == 1


@pytest.mark.parametrize("steps", [1, 2])
def test_an_advantage_hook_sees_log_probs_and_its_advantages_are_trained_on(hf_dir, tmp_path, steps):
    options = hooked(advantage="advantage_from_log_probs", before_log_prob="note_log_prob")
    objective = ObjectiveOptions(skip_zero_advantage=True)
    plain, _ = train_once(make_config(hf_dir, num_steps_per_rollout=steps), tmp_path / "a", make_batch())
    config = make_config(hf_dir, objective, options, num_steps_per_rollout=steps)
    found, metrics = train_once(config, tmp_path / "b", make_batch())
    assert differ(plain, found)
    assert metrics["train/samples_skipped"] == 4
    assert "log_probs" in calls_of("advantage")[0]["columns"]
    assert calls_of("before_log_prob") == [{"prefix": "", "chunks": 1}]


@pytest.mark.parametrize("advantage", [None, "advantage_and_nothing_unknown"])
def test_a_hook_that_drops_columns_it_does_not_know_leaves_the_weight_of_siblings_as_it_is(hf_dir, tmp_path, advantage):
    batch = make_batch(rollout_ids=[0, 0, 0, 1] * 4)
    own = {"advantage": "advantage_from_log_probs"} if advantage else {}
    tidy = {"advantage": advantage} if advantage else {"rollout_data_postprocess": "forget_the_unknown"}
    expected, metrics = train_once(make_config(hf_dir, hooked(**own)), tmp_path / "a", batch)
    found, tidied = train_once(make_config(hf_dir, hooked(**tidy)), tmp_path / "b", batch)
    assert calls_of("rollout_data_postprocess")
    assert_same_weights(expected, found)
    assert tidied["train/loss"] == pytest.approx(metrics["train/loss"], abs=1e-6)


def test_advantages_of_another_precision_become_fp32(hf_dir):
    options = hooked(advantage="advantage_from_log_probs", rollout_data_postprocess="mask_first_token")
    with tiny.Started(make_config(hf_dir, options)) as trainer:
        trainer.train(0, make_batch())
    assert calls_of("rollout_data_postprocess")[0]["advantages"].dtype == torch.float32


def test_without_a_pass_for_log_probs_an_advantage_hook_sees_those_of_the_engine(hf_dir, tmp_path):
    objective = ObjectiveOptions(use_rollout_logprobs=True)
    options = hooked(advantage="advantage_from_log_probs", before_log_prob="note_log_prob")
    with tiny.Started(make_config(hf_dir, objective, options)) as trainer:
        trainer.train(0, make_batch())
        assert tiny.stats_of(trainer)["before_log_prob"] == (0, 1, 0)
    assert calls_of("advantage")
