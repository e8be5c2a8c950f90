"""What the objective's options make of each other: what follows from the estimator, and what contradicts it.

Imports no torch: `miles check` asks for it before anything starts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.config import DERIVED
from miles_api.loading.hookset import configured_hooks
from miles_api.run_options import RunOptions
from miles_train.estimators import ESTIMATORS, Estimator
from miles_train.objective_rules import contradictions
from miles_train.options import ObjectiveOptions

if TYPE_CHECKING:
    from collections.abc import Iterator

    from miles_api.config import RunConfig

__all__ = ["check_objective", "derived_rewards", "objective_notes"]

_CENTRED, _SCALED = "rewards_normalization", "grpo_std_normalization"
"""Options of the rollout process, whose package may be absent where only the trainer is installed."""


def derived_rewards(config: RunConfig) -> dict[str, bool]:
    """Return `rewards_normalization` as off for an estimator that takes rewards as they are; empty where the run says
    whether they are normalised, or has no such option. A critic takes them so also beside an advantage hook."""
    chosen = ESTIMATORS[config.group(ObjectiveOptions).advantage_estimator]
    estimator = chosen if chosen.needs_values else _estimator(config)
    if estimator is None or not estimator.takes_plain_rewards or _CENTRED not in config.flat():
        return {}
    return {} if _CENTRED in config.sources else {_CENTRED: False}


def objective_notes(config: RunConfig) -> Iterator[str]:
    """Yield what the estimator has changed of the rollout's options, and a default that means little to it."""
    if config.sources.get(_CENTRED) == DERIVED:
        name = config.group(ObjectiveOptions).advantage_estimator
        yield f"advantage_estimator: {name} takes rewards as they are: --rewards-normalization is off"
    objective = config.group(ObjectiveOptions)
    if objective.advantage_estimator == "gspo" and "eps_clip" not in config.sources:
        yield (
            f"advantage_estimator: gspo clips ratios of whole responses, which stay close to 1: --eps-clip "
            f"{objective.eps_clip:g} clips next to nothing, its paper has 3e-4 and --eps-clip-high 4e-4"
        )
    if objective.kl_loss_type == "k1" and objective.kl_loss_coef > 0 and not objective.use_unbiased_kl:
        yield (
            "kl_loss_type: k1 in the loss has a gradient of mean 0 on the policy's own tokens, and so holds nothing "
            "near the reference model: k2, k3 or --use-unbiased-kl do"
        )
    if objective.kl_coef > 0 and objective.kl_loss_type not in (None, "k1"):
        yield (
            f"kl_loss_type: {objective.kl_loss_type} in the reward has next to no gradient near the reference model, "
            "and so holds little there: k1 does"
        )
    if objective.lambd != 1.0 and _estimator(config) is None:
        yield f"lambd: an advantage hook makes the advantages, and nobody but it reads --lambd {objective.lambd:g}"
    if objective.use_kl_loss and not objective.kl_loss_coef:
        yield "use_kl_loss: the KL divergence is only reported; --kl-loss-coef weighs it in the loss"


def check_objective(config: RunConfig) -> Iterator[str]:
    """Yield what cannot be meant together, with the flags and the way out."""
    yield from contradictions(config)
    run, objective = config.group(RunOptions), config.group(ObjectiveOptions)
    name, estimator = objective.advantage_estimator, _estimator(config)
    # A hook beside a critic may compute advantages of its own from values, gamma and lambda.
    discounts = ESTIMATORS[name].discounts and (estimator is not None or name == "ppo")
    if objective.gamma != 1.0 and not discounts:
        reason = f"--advantage-estimator {name} has none"
        if estimator is None:
            supervised = run.loss_type == "sft_loss"
            reason = "--loss-type sft_loss has no advantages" if supervised else "an advantage hook is set"
        yield f"--gamma {objective.gamma:g} is the discount of ppo and reinforce_plus_plus, and {reason}: leave it out"
    if objective.policy_loss_type == "cispo":
        yield from _cispo(run, objective)
    if estimator is not None:
        yield from _rewards(config, name, estimator)


def _cispo(run: RunOptions, objective: ObjectiveOptions) -> Iterator[str]:
    if run.loss_type not in ("policy_loss", "value_loss"):  # the latter is about all parts of the policy loss
        yield f"--policy-loss-type cispo belongs to --loss-type policy_loss, not to {run.loss_type}: drop one"
    if objective.advantage_estimator == "gspo":
        yield (
            "--advantage-estimator gspo clips the ratio of whole responses and --policy-loss-type cispo the weights of "
            "tokens: choose gspo, or cispo with grpo, whose advantages are the same"
        )
    if objective.eps_clip_c is not None:
        yield "--eps-clip-c bounds a clipped loss, and --policy-loss-type cispo has none: drop one"


def _rewards(config: RunConfig, name: str, estimator: Estimator) -> Iterator[str]:
    """Check that the default reward post-processing leaves of rewards what the estimator builds on."""
    run, options, hooks = config.group(RunOptions), config.flat(), configured_hooks(config.args)
    if estimator.baseline is not None and run.n_samples_per_prompt == 1 and "rollout" not in hooks:
        yield (
            f"--advantage-estimator {name} compares the samples of a prompt, and --n-samples-per-prompt is 1: all "
            "advantages would be 0. Sample more, or use reinforce_plus_plus"
        )
    if "reward_post_process" in hooks or not estimator.takes_plain_rewards or not options.get(_CENTRED):
        return
    if estimator.needs_values:
        yield (
            f"--advantage-estimator {name} compares rewards with its critic, and --rewards-normalization with their "
            "group: pass --no-rewards-normalization"
        )
    elif estimator.baseline is None:
        yield (
            f"--advantage-estimator {name} has no baseline, and --rewards-normalization subtracts one: pass "
            f"--no-rewards-normalization, or use {name}_baseline"
        )
    elif options.get(_SCALED):
        yield (
            f"--advantage-estimator {name} needs rewards that are not divided by their group's spread: pass "
            "--no-rewards-normalization"
        )


def _estimator(config: RunConfig) -> Estimator | None:
    """Return what makes the advantages, if not a hook or a loss without any."""
    if config.group(RunOptions).loss_type == "sft_loss" or "advantage" in configured_hooks(config.args):
        return None
    return ESTIMATORS[config.group(ObjectiveOptions).advantage_estimator]
