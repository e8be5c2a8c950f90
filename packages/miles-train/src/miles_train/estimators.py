"""The advantage estimators: what each does with rewards, and the baselines of whole groups."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from miles_api.errors import SampleError

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["ESTIMATORS", "Estimator", "with_baselines"]


class Estimator(NamedTuple):
    """What is done with the column `rewards`, in this order; without any of it every token gets the sample's reward."""

    baseline: Literal["group", "leave_one_out"] | None = None
    """What is subtracted: the mean reward of the group's rollouts, or of all of them but the sample's own."""
    discounts: bool = False
    """Whether the reward counts less for tokens further from the end."""
    whitens: bool = False
    """Whether advantages are brought to mean 0 and spread 1 over the whole rollout, unless --normalize-advantages says
    otherwise."""
    needs_values: bool = False
    """Whether advantages compare rewards with a critic's values of each token."""

    @property
    def takes_plain_rewards(self) -> bool:
        """Whether it centres rewards itself, and so wants them as the reward function gave them."""
        return self != Estimator()


ESTIMATORS = {
    "grpo": Estimator(),
    "gspo": Estimator(),
    "ppo": Estimator(needs_values=True, discounts=True, whitens=True),
    "rloo": Estimator(baseline="leave_one_out"),
    "reinforce_plus_plus": Estimator(discounts=True, whitens=True),
    "reinforce_plus_plus_baseline": Estimator(baseline="group", whitens=True),
}
"""By `--advantage-estimator`. gspo differs from grpo in the loss alone."""


def with_baselines(columns: dict[str, Any], estimator: Estimator) -> dict[str, Any]:
    """Return the columns with `baselines`, one number a sample, for an estimator that has a baseline.

    Called once a rollout on each rank with the columns of all ranks, for groups may be spread over them. Groups are
    told by `group_indices` and may have any size. Samples of one rollout (`rollout_ids`) count once, with their mean
    reward; without that column each sample is a rollout. Samples that no longer train count too. A group of one
    rollout gives no baseline to compare with: its samples get their own rewards, hence no advantage.

    Raises:
        SampleError: the batch does not say which samples make a group, or brings a column of that name.
    """
    if estimator.baseline is None:
        return columns
    if "baselines" in columns:
        raise SampleError("column 'baselines' is computed by the trainer; a rollout's own needs another name")
    if "group_indices" not in columns:
        raise SampleError(
            "the train batch has no column 'group_indices', which an --advantage-estimator with a baseline needs"
        )
    rewards, groups = columns["rewards"], columns["group_indices"]
    rollouts = columns.get("rollout_ids", range(len(rewards)))
    scores: dict[Any, dict[Any, list[float]]] = defaultdict(lambda: defaultdict(list))
    for group, rollout, reward in zip(groups, rollouts, rewards, strict=True):
        scores[group][rollout].append(reward)
    means = {group: {rollout: _mean(own) for rollout, own in by.items()} for group, by in scores.items()}
    whole = estimator.baseline == "group"
    baselines = {group: _group_means(by) if whole else _others_means(by) for group, by in means.items()}
    found = [baselines[group][rollout] for group, rollout in zip(groups, rollouts, strict=True)]
    return columns | {"baselines": [r if b is None else b for r, b in zip(rewards, found, strict=True)]}


def _group_means(by_rollout: dict[Any, float]) -> dict[Any, float | None]:
    mean = _mean(list(by_rollout.values())) if len(by_rollout) > 1 else None
    return dict.fromkeys(by_rollout, mean)


def _others_means(by_rollout: dict[Any, float]) -> dict[Any, float | None]:
    scores = list(by_rollout.values())
    return {
        rollout: _mean([*scores[:place], *scores[place + 1 :]]) if len(scores) > 1 else None
        for place, rollout in enumerate(by_rollout)
    }


def _mean(scores: Sequence[float]) -> float:
    # Equal scores must give exactly that score: what is left of it decides which samples pull.
    return scores[0] if min(scores) == max(scores) else math.fsum(scores) / len(scores)
