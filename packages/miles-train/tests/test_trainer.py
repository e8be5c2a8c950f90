"""The whole trainer on a tiny Qwen3: it learns, and how a step is cut up does not change what it learns."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch

from miles_api.errors import MilesError, SampleError
from miles_train.options import BatchingOptions, ObjectiveOptions, OptimizerOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")
VOCAB, LR = tiny.VOCAB, tiny.LR
make_batch, make_config, Started = tiny.make_batch, tiny.make_config, tiny.Started
weights_of, train_once, assert_same_weights = tiny.weights_of, tiny.train_once, tiny.assert_same_weights


def hf_log_probs(directory, batch, temperature=1.0):
    """Return each sample's response log-probs according to transformers."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    result = []
    for tokens, length in zip(batch["tokens"], batch["response_lengths"], strict=True):
        with torch.no_grad():
            rows = torch.log_softmax(model(torch.tensor([tokens])).logits[0] / temperature, -1)[-length - 1 : -1]
        result.append(rows.gather(-1, torch.tensor(tokens[-length:])[:, None]).squeeze(-1).tolist())
    return result


def test_supervised_training_on_a_few_samples_lowers_the_loss(hf_dir):
    batch = make_batch(2, 4)
    del batch["rewards"]
    with Started(make_config(hf_dir, OptimizerOptions(lr=3e-3), loss_type="sft_loss")) as trainer:
        losses = [trainer.train(i, batch).metrics["train/loss"] for i in range(12)]
    assert losses[0] == pytest.approx(math.log(VOCAB), abs=0.2)
    assert losses[-1] < losses[0] - 1


def test_a_policy_step_raises_what_was_rewarded_and_lowers_what_was_not(hf_dir, tmp_path):
    batch = make_batch()
    train_once(make_config(hf_dir), tmp_path, batch)
    before, after = hf_log_probs(hf_dir, batch), hf_log_probs(tmp_path, batch)
    gains = [sum(b) - sum(a) for a, b in zip(before, after, strict=True)]
    good = [gain for gain, reward in zip(gains, batch["rewards"], strict=True) if reward > 0]
    bad = [gain for gain, reward in zip(gains, batch["rewards"], strict=True) if reward < 0]
    assert sum(good) / len(good) > 0.05
    assert sum(bad) / len(bad) < -0.05


@pytest.mark.parametrize("per_token", [False, True])
def test_the_size_of_micro_batches_does_not_change_the_weights_or_the_metrics(hf_dir, tmp_path, per_token):
    objective = ObjectiveOptions(calculate_per_token_loss=per_token, entropy_coef=0.01)
    results = [
        train_once(
            make_config(hf_dir, objective, BatchingOptions(**batching)),
            tmp_path / str(number),
            make_batch(),
        )
        for number, batching in enumerate(({}, {"max_tokens_per_gpu": 20}, {"use_dynamic_batch_size": False}))
    ]
    few, many, one_each = (tiny.pop_packing(metrics) for _, metrics in results)
    assert few < many < one_each == 16
    for weights, metrics in results[1:]:
        assert_same_weights(results[0][0], weights)
        assert results[0][1] == pytest.approx(metrics, abs=1e-5)
    assert results[0][1]["train/entropy"] == pytest.approx(math.log(VOCAB), abs=0.3)


def in_turns(batch):
    """Return the batch with each response as two samples: its first token, and the rest behind it as a prompt."""
    split = {name: [entry for entry in column for _ in range(2)] for name, column in batch.items()}
    split["sample_indices"] = list(range(len(split["tokens"])))
    split["tokens"] = [
        part
        for tokens, n in zip(batch["tokens"], batch["response_lengths"], strict=True)
        for part in (tokens[: len(tokens) - n + 1], tokens)
    ]
    split["response_lengths"] = [part for n in batch["response_lengths"] for part in (1, n - 1)]
    for name in ("loss_masks", "rollout_log_probs"):
        split[name] = [part for values in batch[name] for part in (values[:1], values[1:])]
    return split


@pytest.mark.parametrize("objective", [{}, {"loss_length_norm": 5.0}])
def test_a_conversation_trains_the_same_as_one_sample_or_as_two(hf_dir, tmp_path, objective):
    batch = make_batch(rollout_ids=[7 + i for i in range(16)])
    batch["loss_masks"][5] = [0] * batch["response_lengths"][5]  # removed
    options = ObjectiveOptions(entropy_coef=0.01, **objective)
    (whole, expected), (turns, found) = (
        train_once(make_config(hf_dir, options, BatchingOptions(max_tokens_per_gpu=40)), tmp_path / str(i), columns)
        for i, columns in enumerate((batch, in_turns(batch)))
    )
    assert_same_weights(whole, turns)
    assert found["train/tokens"] > expected["train/tokens"]
    for name in ("loss", "pg_loss", "entropy", "pg_clipfrac", "ppo_kl", "ratio_max", "grad_norm"):
        assert found[f"train/{name}"] == pytest.approx(expected[f"train/{name}"], abs=1e-5), name


def test_leaving_out_zero_advantages_gives_the_same_weights_and_loss_with_fewer_tokens(hf_dir, tmp_path):
    batch = make_batch(dead_groups=(0, 3))
    batch["loss_masks"][5] = [0] * batch["response_lengths"][5]  # not trained on either
    (all_weights, everything), (some_weights, some) = (
        train_once(make_config(hf_dir, ObjectiveOptions(skip_zero_advantage=skip)), tmp_path / str(skip), batch)
        for skip in (False, True)
    )
    assert_same_weights(all_weights, some_weights)
    assert some["train/loss"] == pytest.approx(everything["train/loss"], abs=1e-6)
    assert some["train/grad_norm"] == pytest.approx(everything["train/grad_norm"], abs=1e-5)
    assert (everything["train/samples_skipped"], some["train/samples_skipped"]) == (0, 9)
    assert some["train/tokens"] < everything["train/tokens"]


def test_a_step_in_which_nothing_pulls_is_skipped_and_reported(hf_dir, tmp_path):
    config = make_config(hf_dir, ObjectiveOptions(skip_zero_advantage=True))
    with Started(config) as trainer:
        before = weights_of(trainer, tmp_path / "before")
        nothing = trainer.train(0, make_batch(dead_groups=(0, 1, 2, 3))).metrics
        assert_same_weights(before, weights_of(trainer, tmp_path / "after"), atol=0)
        half = trainer.train(1, make_batch(dead_groups=(0, 1))).metrics
    assert nothing["train/skipped_steps"] == 2
    assert (nothing["train/loss"], nothing["train/tokens"]) == (0, 0)
    assert half["train/skipped_steps"] == 1
    assert half["train/lr"] == pytest.approx(LR)


def test_a_rollout_of_one_step_uses_its_own_log_probs_as_the_old_ones(hf_dir, tmp_path):
    with Started(make_config(hf_dir, num_steps_per_rollout=1)) as trainer:
        report = trainer.train(0, make_batch())
    assert report.metrics["train/ratio_max"] == 1
    assert "log_probs" not in report.seconds


def test_a_second_step_compares_with_the_log_probs_before_the_first(hf_dir, tmp_path):
    """Recomputing every old log-prob, and only those of later steps, is the same."""
    batch = make_batch()
    lazy_weights, lazy = train_once(make_config(hf_dir), tmp_path / "lazy", batch)
    with Started(make_config(hf_dir)) as trainer:
        trainer._learner._recompute_first = True
        full = trainer.train(0, batch).metrics
        full_weights = weights_of(trainer, tmp_path / "full")
    assert_same_weights(lazy_weights, full_weights)
    assert lazy["train/ratio_max"] > 1
    assert lazy == pytest.approx(full, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engines_log_probs_are_compared_with_the_trainers_at_the_sampling_temperature(
    hf_dir, tmp_path, temperature
):
    batch = make_batch()
    batch["rollout_log_probs"] = hf_log_probs(hf_dir, batch, temperature)
    batch["rollout_log_probs"][2][-1] = -50.0  # masked
    batch["rollout_log_probs"][9][0] += 0.5
    for recompute in (True, False):
        config = make_config(
            hf_dir,
            ObjectiveOptions(use_rollout_logprobs=not recompute),
            rollout_temperature=temperature,
            num_steps_per_rollout=2 if recompute else 1,
        )
        _, metrics = train_once(config, tmp_path, batch)
        unmasked = sum(map(sum, batch["loss_masks"]))
        assert metrics["train/logprob_gap_max"] == pytest.approx(0.5, abs=1e-5)
        assert metrics["train/logprob_gap_mean"] == pytest.approx(0.5 / unmasked, abs=1e-5)


def test_log_probs_are_compared_in_the_first_step_that_trains_anything(hf_dir, tmp_path):
    batch = make_batch(dead_groups=(0, 1))
    batch["rollout_log_probs"] = hf_log_probs(hf_dir, batch, 1.0)
    batch["rollout_log_probs"][9][0] += 0.5
    options = ObjectiveOptions(use_rollout_logprobs=True, skip_zero_advantage=True)
    _, metrics = train_once(make_config(hf_dir, options), tmp_path, batch)
    assert metrics["train/skipped_steps"] == 1
    assert metrics["train/logprob_gap_max"] == pytest.approx(0.5, abs=1e-5)


def test_reusing_the_engines_log_probs_gives_the_same_weights_where_the_two_agree(hf_dir, tmp_path):
    batch = make_batch()
    batch["rollout_log_probs"] = hf_log_probs(hf_dir, batch)
    recomputed, _ = train_once(make_config(hf_dir), tmp_path / "a", batch)
    reused, _ = train_once(make_config(hf_dir, ObjectiveOptions(use_rollout_logprobs=True)), tmp_path / "b", batch)
    assert_same_weights(recomputed, reused, atol=2e-6)


def test_a_trainer_continues_after_a_load_exactly_as_the_one_that_saved(hf_dir, tmp_path):
    config = make_config(hf_dir)
    with Started(config) as trainer:
        trainer.train(0, make_batch(seed=0))
        trainer.save(0, str(tmp_path / "checkpoint"))
        for i in (1, 2):
            trainer.train(i, make_batch(seed=i))
        straight = weights_of(trainer, tmp_path / "straight")
    with Started(config) as trainer:
        trainer.load(0, str(tmp_path / "checkpoint"))
        for i in (1, 2):
            trainer.train(i, make_batch(seed=i))
        assert_same_weights(straight, weights_of(trainer, tmp_path / "resumed"), atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": [1.0] * 15 + [math.nan]}, "the reward of sample 115 in rollout 0 is nan"),
        ({"rollout_log_probs": [[math.inf] * n for n in (2, 3, 4, 5) * 4]}, "of 3 tokens|rollout_log_probs of sample"),
        ({"rewards": None}, "no column 'rewards'"),
    ],
)
def test_a_batch_that_cannot_be_trained_on_stops_before_the_weights_change(hf_dir, tmp_path, change, message):
    with Started(make_config(hf_dir)) as trainer:
        before = weights_of(trainer, tmp_path / "before")
        with pytest.raises(MilesError, match=message):
            trainer.train(0, make_batch() | change)
        assert_same_weights(before, weights_of(trainer, tmp_path / "after"), atol=0)


def test_broken_weights_are_noticed_in_the_log_probs_and_name_a_sample(hf_dir):
    with Started(make_config(hf_dir)) as trainer:
        next(trainer._model[0].parameters()).data[7].fill_(math.nan)
        with pytest.raises(MilesError, match=r"log_probs of sample \d+ in rollout 3.* is nan at position 0"):
            trainer.train(3, make_batch())


def test_reusing_log_probs_that_the_rollout_does_not_have_is_an_error(hf_dir):
    config = make_config(hf_dir, ObjectiveOptions(use_rollout_logprobs=True))
    with Started(config) as trainer, pytest.raises(SampleError, match="--use-rollout-logprobs needs the column"):
        trainer.train(0, make_batch(rollout_log_probs=None))
