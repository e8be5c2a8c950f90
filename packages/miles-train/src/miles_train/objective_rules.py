"""Options of the objective that cannot be meant together, as a table: when, and what is said.

Imports no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from miles_api.hooks import REGISTRY
from miles_api.loading.hookset import configured_hooks
from miles_api.options import flag_of
from miles_api.run_options import RunOptions
from miles_train.estimators import ESTIMATORS
from miles_train.needs import needs_ref, needs_teacher
from miles_train.options import ModelsOptions, ObjectiveOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from miles_api.config import RunConfig

__all__ = ["contradictions"]

_PPO_ALONE = (
    "lambd", "value_clip", "critic_load", "critic_lr", "critic_lr_warmup_iters", "num_critic_only_steps",
)  # fmt: skip
_OF_THE_POLICY_LOSS = (
    "policy_loss_type", "eps_clip", "eps_clip_high", "eps_clip_c", "entropy_coef", "report_entropy", "tis_clip",
    "tis_clip_low", "skip_zero_advantage",
)  # fmt: skip
_OF_THE_KL = ("ref_load", "kl_loss_type")
_OF_THE_TEACHER = ("opd_teacher_load", "opd_kl_coef")


class _Facts(NamedTuple):
    """What rules look at."""

    run: RunOptions
    objective: ObjectiveOptions
    options: dict[str, Any]
    """The options of the objective and of its models by name."""
    changed: frozenset[str]
    """Those of them that have another value than their default: a run file may repeat defaults."""
    hooks: frozenset[str]
    """Names of the configured hooks."""

    @property
    def no_advantages(self) -> str:
        """Say why our estimators do not run; empty if they do."""
        if self.run.loss_type == "sft_loss":
            return "--loss-type sft_loss has no advantages"
        hook = "advantage" in self.hooks
        return f"{REGISTRY['advantage'].flag} makes the advantages" if hook else ""


class _Rule(NamedTuple):
    """A contradiction: `text` may name facts as format fields."""

    broken: Callable[[_Facts], bool]
    text: str


_RULES = (
    _Rule(
        lambda f: bool(f.objective.kl_loss_coef) and not f.objective.use_kl_loss,
        "--kl-loss-coef {f.objective.kl_loss_coef:g} weighs what --use-kl-loss adds to the loss: pass that too, or "
        "leave --kl-loss-coef out",
    ),
    _Rule(
        lambda f: f.objective.use_unbiased_kl and not f.objective.use_kl_loss,
        "--use-unbiased-kl weighs what --use-kl-loss adds to the loss: pass that too, or leave --use-unbiased-kl out",
    ),
    _Rule(
        lambda f: f.objective.use_kl_loss and f.run.loss_type != "policy_loss",
        "--use-kl-loss is a part of --loss-type policy_loss, not of {f.run.loss_type}: drop one",
    ),
    _Rule(
        lambda f: f.objective.kl_coef > 0 and bool(f.no_advantages),
        "--kl-coef {f.objective.kl_coef:g} is taken off the rewards of an --advantage-estimator, and "
        "{f.no_advantages}: leave it out, or use --use-kl-loss, which is a part of the policy loss",
    ),
    _Rule(
        lambda f: f.objective.kl_coef > 0 and not f.no_advantages and not _plain(f.objective),
        "--kl-coef {f.objective.kl_coef:g} is taken off plain rewards, and those of --advantage-estimator "
        "{f.objective.advantage_estimator} arrive normalised: use --use-kl-loss --kl-loss-coef "
        "{f.objective.kl_coef:g}, or --advantage-estimator ppo, rloo, reinforce_plus_plus or "
        "reinforce_plus_plus_baseline",
    ),
    _Rule(
        lambda f: f.objective.use_opd and bool(f.no_advantages),
        "--use-opd adds to the advantages of an --advantage-estimator, and {f.no_advantages}: drop one",
    ),
    _Rule(
        lambda f: f.objective.advantage_estimator == "ppo" and f.run.loss_type == "sft_loss",
        "--advantage-estimator ppo trains a critic for its advantages, and --loss-type sft_loss has none: drop one",
    ),
    _Rule(
        lambda f: f.objective.advantage_estimator == "ppo"
        and f.run.loss_type != "value_loss"
        and f.options["num_critic_only_steps"] >= f.run.num_rollout,
        "--num-critic-only-steps {f.options[num_critic_only_steps]} leaves none of the {f.run.num_rollout} rollouts of "
        "--num-rollout to the policy: make it less, or pass --loss-type value_loss",
    ),
    _Rule(
        lambda f: f.objective.normalize_advantages is not None and f.run.loss_type == "sft_loss",
        "--normalize-advantages is set, and --loss-type sft_loss has no advantages: leave it out",
    ),
    _Rule(
        lambda f: f.objective.loss_length_norm is not None and f.objective.calculate_per_token_loss,
        "--loss-length-norm {f.objective.loss_length_norm:g} divides the sum of each rollout's tokens, and "
        "--calculate-per-token-loss averages over all tokens of a step: drop one",
    ),
    _Rule(
        lambda f: f.objective.loss_length_norm is not None and "pg_loss_reducer" in f.hooks,
        "--loss-length-norm {f.objective.loss_length_norm:g} is a reduction, and so is "
        "--custom-pg-loss-reducer-function-path: drop one",
    ),
    _Rule(
        lambda f: f.objective.skip_zero_advantage and f.objective.entropy_coef > 0,
        "--skip-zero-advantage leaves samples out that --entropy-coef would train: set one of them",
    ),
    _Rule(
        lambda f: f.objective.skip_zero_advantage and f.objective.use_kl_loss and f.objective.kl_loss_coef > 0,
        "--skip-zero-advantage leaves samples out that --use-kl-loss --kl-loss-coef {f.objective.kl_loss_coef:g} would "
        "train: set one of them",
    ),
)  # fmt: skip


def contradictions(config: RunConfig) -> Iterator[str]:
    """Yield each broken rule, with the flags and the way out."""
    facts = _facts(config)
    yield from (rule.text.format(f=facts) for rule in _RULES if rule.broken(facts))
    unread: list[tuple[tuple[str, ...], str]] = []
    if facts.objective.advantage_estimator != "ppo":
        name = facts.objective.advantage_estimator
        unread += [(_PPO_ALONE, f"belongs to --advantage-estimator ppo, which has a critic, not to {name}")]
    if not needs_ref(facts.objective):
        unread += [(_OF_THE_KL, "is about the KL divergence, and neither --use-kl-loss nor --kl-coef is set")]
    if not needs_teacher(facts.objective):
        unread += [(_OF_THE_TEACHER, "is about the teacher of --use-opd, which is not set")]
    if facts.run.loss_type == "value_loss":
        alone = "--loss-type value_loss trains the critic alone"
        unread += [(_OF_THE_POLICY_LOSS, f"is about the policy loss, and {alone}")]
        unread += [(("num_critic_only_steps",), f"says how long the policy waits, and {alone}, in every rollout")]
    for names, reason in unread:
        yield from (_unread(name, facts, reason) for name in names if name in facts.changed)


def _unread(name: str, facts: _Facts, reason: str) -> str:
    value = facts.options[name]
    shown = "" if value is True else f" {'null' if value is None else value}"
    return f"{flag_of(name)}{shown} {reason}: leave it out"


def _plain(objective: ObjectiveOptions) -> bool:
    return ESTIMATORS[objective.advantage_estimator].takes_plain_rewards


def _facts(config: RunConfig) -> _Facts:
    objective, models = config.group(ObjectiveOptions), config.group(ModelsOptions)
    defaults = msgspec.structs.asdict(ObjectiveOptions()) | msgspec.structs.asdict(ModelsOptions())
    options = msgspec.structs.asdict(objective) | msgspec.structs.asdict(models)
    changed = frozenset(name for name, value in options.items() if value != defaults[name])
    hooks = frozenset(configured_hooks(config.args))
    return _Facts(config.group(RunOptions), objective, options, changed, hooks)
