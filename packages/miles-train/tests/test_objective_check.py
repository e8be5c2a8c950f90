"""What the estimator settles by itself, and which combinations of the objective are refused."""

from __future__ import annotations

from importlib import import_module

import pytest

from miles_api.errors import ConfigError
from miles_api.hook_options import HookOptions
from miles_api.options import Options
from miles_train.driver.check import derived, notes
from miles_train.objective_check import check_objective
from miles_train.options import ObjectiveOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")


class RewardOptions(Options, frozen=True, kw_only=True):
    """As the rollout package has them."""

    rewards_normalization: bool = True
    grpo_std_normalization: bool = True


def make(*options, given=(), run=None, **objective):
    """Return a config in which the options named in `given` were set by the run."""
    config = tiny.make_config("", ObjectiveOptions(**objective), *(options or [RewardOptions()]), **(run or {}))
    return config.replace("command line", **{name: config.flat()[name] for name in given})


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_an_estimator_that_centres_rewards_itself_turns_their_normalisation_off(name):
    config = make(advantage_estimator=name)
    assert any(name in problem for problem in check_objective(config))
    settled = config.replace(**derived(config))
    assert settled.flat()["rewards_normalization"] is False
    assert not list(check_objective(settled))
    assert any(f"{name} centres rewards itself" in note for note in notes(settled))
    assert derived(settled) == {}


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_grpo_and_gspo_leave_the_normalisation_of_rewards_to_the_rollout(name):
    config = make(advantage_estimator=name)
    assert derived(config) == {}
    assert not list(check_objective(config))
    assert not any("centres" in note for note in notes(config))


@pytest.mark.parametrize("given", ["rewards_normalization", "grpo_std_normalization"])
def test_a_normalisation_that_the_run_asks_for_is_not_taken_away_but_refused(given):
    config = make(advantage_estimator="rloo", given=[given])
    assert derived(config) == {}
    [problem] = check_objective(config)
    assert "rloo needs rewards that are not divided by their group's spread: pass --no-rewards-normalization" in problem
    with pytest.raises(ConfigError, match="rloo needs rewards"):
        tiny.Started(config)


def test_rewards_that_are_only_centred_do_not_disturb_a_baseline_and_make_plain_reinforce_another_estimator():
    centred = RewardOptions(grpo_std_normalization=False)
    for name in ("rloo", "reinforce_plus_plus_baseline"):
        assert not list(check_objective(make(centred, advantage_estimator=name)))
    [problem] = check_objective(make(centred, advantage_estimator="reinforce_plus_plus"))
    assert "pass --no-rewards-normalization, or use reinforce_plus_plus_baseline" in problem


def test_whoever_normalises_rewards_or_makes_advantages_in_a_hook_decides():
    own = HookOptions(custom_reward_post_process_path="mine.py:rewards")
    assert not list(check_objective(make(RewardOptions(), own, advantage_estimator="rloo")))
    config = make(RewardOptions(), tiny.hooked(advantage="no_returns"), advantage_estimator="rloo")
    assert derived(config) == {}
    assert not list(check_objective(config))


def test_a_trainer_without_the_rollout_package_has_no_such_options():
    config = tiny.make_config("", ObjectiveOptions(advantage_estimator="rloo"))
    assert derived(config) == {}
    assert not list(check_objective(config))


@pytest.mark.parametrize(
    ("objective", "run", "message"),
    [
        ({"gamma": 0.9}, {}, "--gamma 0.9 is the discount of reinforce_plus_plus, and --advantage-estimator grpo has"),
        ({"gamma": 0.9}, {"loss_type": "sft_loss"}, "and --loss-type sft_loss has no advantages: leave it out"),
        ({"policy_loss_type": "cispo", "eps_clip_c": 3.0}, {}, "--eps-clip-c bounds a clipped loss"),
        ({"policy_loss_type": "cispo", "advantage_estimator": "gspo"}, {}, "choose gspo, or cispo with grpo"),
        ({"policy_loss_type": "cispo"}, {"loss_type": "sft_loss"}, "cispo belongs to --loss-type policy_loss"),
        ({"advantage_estimator": "rloo"}, {"n_samples_per_prompt": 1}, "--n-samples-per-prompt is 1: all advantages"),
    ],
)
def test_options_that_cannot_be_meant_together_are_named(objective, run, message):
    plain = RewardOptions(rewards_normalization=False)
    [problem] = check_objective(make(plain, run=run, **objective))
    assert message in problem


def test_the_objectives_that_exist_fit_together():
    plain = RewardOptions(rewards_normalization=False)
    for objective in (
        {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "policy_loss_type": "cispo"},
        {"advantage_estimator": "gspo", "eps_clip_c": 3.0},
        {"advantage_estimator": "rloo", "policy_loss_type": "cispo"},
    ):
        assert not list(check_objective(make(plain, run={"n_samples_per_prompt": 4}, **objective)))
