"""Contributed importance weights in the trainer: one of them is its default, and what contradicts them is refused."""

import pytest
import torch

from miles_api.checks.check import check_words
from miles_api.testing import hook_args, tensors
from miles_hooks_contrib.mis import mis
from miles_hooks_contrib.tis import tis
from miles_train.importance import truncated_importance_sampling


def columns():
    data = tensors.rollout_data(torch)
    names = ("log_probs", "rollout_log_probs", "loss_masks")
    train, rollout, masks = ([column.clone() for column in data[name]] for name in names)
    return {
        "pg_loss": torch.linspace(-1, 1, sum(map(len, masks))),
        "train_log_probs": train,
        "rollout_log_probs": rollout,
        "loss_masks": masks,
    }


@pytest.mark.parametrize("clips", [{}, {"tis_clip": 1.1, "tis_clip_low": 0.9}])
def test_the_hook_tis_is_the_default_of_use_tis(clips):
    given = columns()
    ours, masks, metrics = tis(hook_args(**clips), **given)
    default, same, theirs = truncated_importance_sampling(hook_args(**clips), **given)
    assert torch.equal(ours, default)
    assert masks == same
    assert metrics.keys() == theirs.keys()
    assert all(torch.equal(metrics[name], theirs[name]) for name in theirs)


def test_mis_at_its_defaults_weighs_as_use_tis_does():
    given = columns()
    kept = torch.cat(given["loss_masks"]) != 0
    ours, masks, _ = mis(hook_args(mis, use_tis=True), **given)
    default, *_ = truncated_importance_sampling(hook_args(), **given)
    torch.testing.assert_close(ours[kept], default[kept])
    assert torch.equal(torch.cat(masks), torch.cat(given["loss_masks"]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], []),
        (
            ["--use-rollout-logprobs"],
            ["--use-rollout-logprobs with --custom-tis-function-path mis would correct twice"],
        ),
        (["--tis-clip", "3"], ["--tis-clip is not read by --custom-tis-function-path mis: set --tis-lower-bound and"]),
        (
            ["--tis-mode", "clip", "--tis-upper-bound", "0.5"],
            ["--tis-lower-bound 2 is not below --tis-upper-bound 0.5"],
        ),
        (["--rs-veto-threshold", "1e-4"], ["--rs-veto-threshold has no effect without --use-rs"]),
        (["--tis-level", "word"], ["--tis-level = 'word'"]),
    ],
)
def test_options_that_do_not_fit_the_weights_are_told_before_a_start(words, said):
    report = check_words(["--use-tis", "--custom-tis-function-path", "mis", *words], prog="miles check")
    ours = [problem.message for problem in report.problems if "tis" in problem.message or "rs-" in problem.message]
    assert len(ours) == len(said)
    assert all(part in message for part, message in zip(said, ours, strict=True))
