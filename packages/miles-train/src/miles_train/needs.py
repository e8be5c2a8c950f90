"""What an objective needs besides rewards: other models, old log-probs, whitening. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_train.estimators import ESTIMATORS

if TYPE_CHECKING:
    from miles_train.options import ObjectiveOptions

__all__ = ["needs_old_log_probs_first", "needs_ref", "needs_teacher", "whitens"]


def needs_ref(objective: ObjectiveOptions) -> bool:
    """Say whether the reference model's log-probs are needed, for a KL divergence in loss, reward or report."""
    return objective.use_kl_loss or objective.kl_coef > 0


def needs_teacher(objective: ObjectiveOptions) -> bool:
    """Say whether a teacher's log-probs are needed, the rollout's or the trainer's."""
    return objective.use_opd


def needs_old_log_probs_first(objective: ObjectiveOptions) -> bool:
    """Say whether advantages are made of old log-probs, which then must be there for all samples, and on pipeline
    stages that have none there are no advantages."""
    return objective.kl_coef > 0 or objective.use_opd


def whitens(objective: ObjectiveOptions, *, made_by_hook: bool = False) -> bool:
    """Say whether advantages are whitened; those of a hook only where --normalize-advantages asks for it."""
    if objective.normalize_advantages is not None:
        return objective.normalize_advantages
    return not made_by_hook and ESTIMATORS[objective.advantage_estimator].whitens
