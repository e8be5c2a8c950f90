"""What the estimator settles by itself, and which combinations of the objective are refused."""

from __future__ import annotations

from importlib import import_module

import pytest

from miles_api.config import DERIVED
from miles_api.errors import ConfigError
from miles_api.hook_options import HookOptions
from miles_api.options import Options
from miles_api.parsing.parse import parse_run
from miles_train.driver.check import check, derived, notes
from miles_train.estimators import ESTIMATORS
from miles_train.objective_check import check_objective
from miles_train.options import BatchingOptions, ClusterOptions, LoggingOptions, ModelsOptions, ObjectiveOptions

tiny = import_module("packages.miles-train.tests.tiny_trainer")


class RewardOptions(Options, frozen=True, kw_only=True):
    """As the rollout package has them."""

    rewards_normalization: bool = True
    grpo_std_normalization: bool = True


def make(*options, given=(), run=None, **objective):
    """Return a config in which the options named in `given` were set by the run."""
    groups = [ObjectiveOptions(**objective), ClusterOptions(), *(options or [RewardOptions()])]
    config = tiny.make_config("", *groups, **(run or {}))
    return config.replace("command line", **{name: config.flat()[name] for name in given})


@pytest.mark.parametrize("name", ["rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"])
def test_an_estimator_that_centres_rewards_itself_turns_their_normalisation_off(name):
    config = make(advantage_estimator=name)
    assert any(name in problem for problem in check_objective(config))
    settled = config.replace(**derived(config))
    assert settled.flat()["rewards_normalization"] is False
    assert not list(check_objective(settled))
    assert any(f"{name} takes rewards as they are" in note for note in notes(settled))
    assert derived(settled) == {}


@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_grpo_and_gspo_leave_the_normalisation_of_rewards_to_the_rollout(name):
    config = make(advantage_estimator=name)
    assert derived(config) == {}
    assert not list(check_objective(config))
    assert not any("centres" in note for note in notes(config))


def test_a_normalisation_that_the_run_asks_for_is_not_taken_away_but_refused():
    config = make(advantage_estimator="rloo", given=["rewards_normalization"])
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
        ({"gamma": 0.9}, {}, "--gamma 0.9 is the discount of ppo and reinforce_plus_plus, and --advantage"),
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


PPO = {"advantage_estimator": "ppo"}


@pytest.mark.parametrize(
    ("objective", "run", "message"),
    [
        ({"kl_loss_coef": 0.1}, {}, "--kl-loss-coef 0.1 weighs what --use-kl-loss adds to the loss: pass that too"),
        ({"use_unbiased_kl": True}, {}, "--use-unbiased-kl weighs what --use-kl-loss adds to the loss: pass that too"),
        ({"use_kl_loss": True}, {"loss_type": "custom_loss"}, "part of --loss-type policy_loss, not of custom_loss"),
        ({"use_kl_loss": True}, {"loss_type": "sft_loss"}, "part of --loss-type policy_loss, not of sft_loss"),
        ({"kl_coef": 0.1}, {}, "--advantage-estimator grpo arrive normalised: use --use-kl-loss --kl-loss-coef 0.1"),
        ({"kl_coef": 0.1, "advantage_estimator": "gspo"}, {}, "those of --advantage-estimator gspo arrive normalised"),
        ({"kl_coef": 0.1} | PPO, {"loss_type": "sft_loss"}, "--loss-type sft_loss has no advantages: leave it out"),
        ({"use_opd": True}, {"loss_type": "sft_loss"}, "--use-opd adds to the advantages of an --advantage-estimator"),
        (PPO, {"loss_type": "sft_loss"}, "--advantage-estimator ppo trains a critic for its advantages, and --loss"),
        ({"normalize_advantages": False}, {"loss_type": "sft_loss"}, "--normalize-advantages is set, and --loss-type"),
        ({"loss_length_norm": 64.0, "calculate_per_token_loss": True}, {}, "--loss-length-norm 64 divides the sum of"),
        ({"skip_zero_advantage": True, "entropy_coef": 0.1}, {}, "leaves samples out that --entropy-coef would train"),
        (
            {"skip_zero_advantage": True, "use_kl_loss": True, "kl_loss_coef": 0.1}, {},
            "leaves samples out that --use-kl-loss --kl-loss-coef 0.1 would train: set one of them",
        ),
        ({"lambd": 0.9}, {}, "--lambd 0.9 belongs to --advantage-estimator ppo, which has a critic, not to grpo"),
        ({"value_clip": None}, {}, "--value-clip null belongs to --advantage-estimator ppo"),
        ({"kl_loss_type": "k2"}, {}, "--kl-loss-type k2 is about the KL divergence, and neither --use-kl-loss nor"),
        ({"opd_kl_coef": 0.5}, {}, "--opd-kl-coef 0.5 is about the teacher of --use-opd, which is not set"),
    ],
)  # fmt: skip
def test_a_part_of_the_objective_without_what_it_belongs_to_is_refused(objective, run, message):
    plain = RewardOptions(rewards_normalization=False)
    assert any(message in problem for problem in check_objective(make(plain, run=run, **objective)))


@pytest.mark.parametrize(
    ("group", "objective", "message"),
    [
        (ModelsOptions(ref_load="/ref"), {}, "--ref-load /ref is about the KL divergence, and neither --use-kl-loss"),
        (ModelsOptions(opd_teacher_load="/t"), {}, "--opd-teacher-load /t is about the teacher of --use-opd, which"),
        (ModelsOptions(critic_load="/c"), {}, "--critic-load /c belongs to --advantage-estimator ppo, which has"),
        (ModelsOptions(critic_lr=0.0), {}, "--critic-lr 0.0 belongs to --advantage-estimator ppo"),
        (ModelsOptions(num_critic_only_steps=2), {}, "--num-critic-only-steps 2 belongs to --advantage-estimator ppo"),
        (ModelsOptions(num_critic_only_steps=20), PPO, "leaves none of the 20 rollouts of --num-rollout to the policy"),
    ],
)
def test_options_of_other_tables_that_do_not_fit_the_objective_are_refused(group, objective, message):
    [problem] = check_objective(make(RewardOptions(rewards_normalization=False), group, **objective))
    assert message in problem


@pytest.mark.parametrize(
    ("group", "flag"),
    [
        (BatchingOptions(micro_batch_size=2), "--micro-batch-size"),
        (BatchingOptions(balance_by_flops=True, balance_data=False), "--balance-by-flops"),
    ],
)
def test_batching_that_would_not_be_done_is_said_once(group, flag):
    config = make(RewardOptions(), group, LoggingOptions())
    assert sum(problem.startswith(flag) for problem in check(config)) == 1


@pytest.mark.parametrize(
    ("objective", "models", "message"),
    [
        ({}, {"num_critic_only_steps": 2}, "--num-critic-only-steps 2 says how long the policy waits, and --loss-type"),
        ({"eps_clip": 0.3}, {}, "--eps-clip 0.3 is about the policy loss, and --loss-type value_loss trains"),
        ({"policy_loss_type": "cispo"}, {}, "--policy-loss-type cispo is about the policy loss, and"),
        ({"report_entropy": True}, {}, "--report-entropy is about the policy loss, and"),
        ({"skip_zero_advantage": True}, {}, "--skip-zero-advantage is about the policy loss, and"),
    ],
)
def test_what_is_the_policys_is_refused_where_the_critic_is_trained_alone(objective, models, message):
    plain = RewardOptions(rewards_normalization=False)
    run = {"loss_type": "value_loss"}
    [problem] = check_objective(make(plain, ModelsOptions(**models), run=run, **PPO, **objective))
    assert message in problem
    assert problem.endswith(": leave it out")


@pytest.mark.parametrize("objective", [{"kl_coef": 0.1, "advantage_estimator": "rloo"}, {"use_opd": True}])
def test_what_changes_the_advantages_of_an_estimator_is_refused_beside_an_advantage_hook(objective):
    config = make(RewardOptions(), tiny.hooked(advantage="no_returns"), **objective)
    [problem] = check_objective(config)
    assert "--custom-advantage-function-path makes the advantages" in problem
    # Such a hook may read the critic's values.
    assert not list(check_objective(make(RewardOptions(), tiny.hooked(advantage="no_returns"), **PPO)))


def test_a_run_file_that_repeats_the_defaults_is_not_held_against_the_run():
    config = make()
    assert not list(check_objective(config.replace("run.toml", **config.flat())))


@pytest.mark.parametrize("name", list(ESTIMATORS))
def test_the_run_file_of_an_interrupted_run_settles_and_checks_as_the_run_did(name, tmp_path):
    first = parse_run(["--advantage-estimator", name, "--n-samples-per-prompt", "4"])
    first = first.replace(DERIVED, **derived(first))
    (tmp_path / "config.toml").write_text(first.to_toml())
    again = parse_run([str(tmp_path / "config.toml")])
    again = again.replace(DERIVED, **derived(again))
    assert again.flat() == first.flat()
    assert not list(check_objective(again))


def test_a_critic_gets_rewards_as_they_are_also_beside_an_advantage_hook_which_may_read_gamma():
    config = make(RewardOptions(), tiny.hooked(advantage="no_returns"), gamma=0.9, **PPO)
    assert derived(config) == {"rewards_normalization": False}
    assert not list(check_objective(config))
    assert derived(make(RewardOptions(), tiny.hooked(advantage="no_returns"))) == {}


def test_the_plan_says_when_a_kl_divergence_holds_little_or_nothing():
    def found(text, **changed):
        return any(text in note for note in notes(make(RewardOptions(rewards_normalization=False), **changed)))

    reward = {"advantage_estimator": "reinforce_plus_plus", "kl_coef": 0.1}
    assert found("k3 in the reward has next to no gradient", kl_loss_type="k3", **reward)
    assert not found("in the reward", **reward)
    assert found("only reported", use_kl_loss=True)
    assert not found("only reported", use_kl_loss=True, kl_loss_coef=0.1)


def test_the_plan_says_that_only_an_advantage_hook_may_read_lambda():
    def found(*options):
        return [text for text in notes(make(RewardOptions(), *options, lambd=0.9, **PPO)) if text.startswith("lambd")]

    assert found() == []
    [note] = found(tiny.hooked(advantage="no_returns"))
    assert "an advantage hook makes the advantages, and nobody but it reads --lambd 0.9" in note


def test_a_value_that_is_switched_off_is_off_in_the_run_file_that_continues_the_run(tmp_path):
    config = parse_run(["--advantage-estimator", "ppo", "--value-clip", "null", "--no-normalize-advantages"])
    (tmp_path / "config.toml").write_text(config.to_toml())
    again = parse_run([str(tmp_path / "config.toml")])
    assert again.flat() == config.flat()
    assert again.group(ObjectiveOptions).value_clip is None


def test_ppo_takes_rewards_as_they_are_and_compares_them_with_its_critic_alone():
    config = make(**PPO)
    assert derived(config) == {"rewards_normalization": False}
    [problem] = check_objective(make(given=["rewards_normalization"], **PPO))
    assert "pass --no-rewards-normalization" in problem
    assert not list(
        check_objective(make(RewardOptions(rewards_normalization=False), run={"n_samples_per_prompt": 1}, **PPO))
    )


def test_the_plan_says_that_k1_in_the_loss_holds_nothing():
    def found(**changed):
        config = make(use_kl_loss=True, kl_loss_coef=0.1, **changed)
        assert not list(check_objective(config))
        return any("k1 in the loss has a gradient of mean 0" in note for note in notes(config))

    assert found(kl_loss_type="k1")
    assert not found(kl_loss_type="k1", use_unbiased_kl=True)
    assert not found(kl_loss_type="k3")


def test_the_objectives_that_exist_fit_together():
    plain = RewardOptions(rewards_normalization=False)
    for objective in (
        {"advantage_estimator": "ppo", "lambd": 0.9, "gamma": 0.99, "value_clip": None, "kl_coef": 0.01},
        {"use_kl_loss": True, "kl_loss_coef": 0.1, "use_unbiased_kl": True, "kl_loss_type": "low_var_kl"},
        {"use_kl_loss": True, "skip_zero_advantage": True},
        {"advantage_estimator": "rloo", "kl_coef": 0.1, "use_opd": True, "opd_kl_coef": 0.5},
        {"normalize_advantages": True, "loss_length_norm": 64.0},
        {"advantage_estimator": "reinforce_plus_plus", "gamma": 0.9, "policy_loss_type": "cispo"},
        {"advantage_estimator": "gspo", "eps_clip_c": 3.0},
        {"advantage_estimator": "rloo", "policy_loss_type": "cispo"},
    ):
        assert not list(check_objective(make(plain, run={"n_samples_per_prompt": 4}, **objective)))
