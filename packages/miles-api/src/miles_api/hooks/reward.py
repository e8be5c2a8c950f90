"""Reward hooks: how good a response is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from miles_api.spec import hook

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample


@hook(
    flag="--custom-rm-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    default="what --rm-type names",
)
async def reward(args: Args, sample: Sample, /) -> float | dict[str, float]:
    """Score one finished sample.

    Called once per sample, concurrently; for each sample of a fan-out. Return a finite number, or a dict from which
    `--reward-key` picks one. Not called for samples whose reward was already set during generation.
    """
    raise NotImplementedError


@hook(
    flag="--custom-rm-path",
    needs="--group-rm",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    default="the reward hook, sample by sample",
)
async def group_reward(args: Args, samples: list[Sample], /) -> list[float | dict[str, float]]:
    """Score all samples of one group together, in their order.

    Called once per group, after its last sample finished, with `--group-rm`; in evaluation with `--eval-group-rm`.
    """
    raise NotImplementedError


@hook(
    flag="--custom-reward-post-process-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    default="centre and scale within each group_index, groups of any size",
)
def reward_post_process(args: Args, samples: list[Sample], /) -> tuple[list[float], list[float]]:
    """Turn the rewards of a whole rollout into what the advantages are made of.

    Called once per rollout, before conversion, with the flat list of samples. Returns `(raw_rewards, rewards)`, each
    as long as `samples`.
    """
    raise NotImplementedError
