"""Do rewards score every sample with finite numbers, alone and at the same time, and change nothing else?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import flatten
from miles_api.testing.case import case
from miles_api.testing.untouched import Untouched

if TYPE_CHECKING:
    from miles_api.sample import Sample
    from miles_api.testing.trial import Trial

__all__: list[str] = []


@case("reward", left_out="whether the scores are right")
def _reward(trial: Trial) -> None:
    def score(samples: list[Sample]) -> None:
        before = Untouched(samples)
        values = trial.together([(trial.args, sample) for sample in samples])
        _require_rewards(trial, samples, values)
        before.require(trial)
        trial.sound(samples)

    with trial.check("scores a finished sample"):
        score(trial.maker.group(1))
    with trial.check("scores a truncated sample"):
        score([trial.maker.truncated()])
    with trial.check("scores a sample with an empty response"):
        score([trial.maker.empty()])
    with trial.check("scores several samples at once"):
        score(trial.maker.group(4))


@case("group_reward", left_out="whether the scores are right")
def _group_reward(trial: Trial) -> None:
    def score(*groups: list[Sample]) -> None:
        before = Untouched([sample for group in groups for sample in group])
        # The hook gets a list of its own: taking samples out of it changes nothing.
        results = trial.together([(trial.args, list(group)) for group in groups])
        for group, result in zip(groups, results, strict=True):
            values = result.tolist() if hasattr(result, "tolist") else result
            trial.require(
                isinstance(values, list | tuple), f"returned a {type(values).__name__}, not a list of rewards"
            )
            trial.require(len(values) == len(group), f"returned {len(values)} rewards for {len(group)} samples")
            _require_rewards(trial, group, values)
            trial.sound(group)
        before.require(trial)

    with trial.check("scores the samples of a group"):
        score(trial.maker.group(3))
    with trial.check("scores a group of one"):
        score(trial.maker.group(1))
    with trial.check("scores a group with an empty and a truncated response"):
        score([trial.maker.empty(), trial.maker.truncated()])
    with trial.check("scores several groups at once"):
        score(trial.maker.group(2), trial.maker.group(3), trial.maker.group(2))


def _require_rewards(trial: Trial, samples: list[Sample], values: Any) -> None:
    """Fail unless each value is a finite number or a dict of them, of one kind, with the key that trains."""
    key = trial.args.reward_key
    kinds: set[tuple[str, ...] | None] = set()
    for sample, value in zip(samples, values, strict=True):
        for name, part in value.items() if isinstance(value, dict) else [("reward", value)]:
            trial.number(part, name, sample)
        kinds.add(tuple(sorted(map(str, value))) if isinstance(value, dict) else None)
        if isinstance(value, dict) and key is None:
            trial.note(f"returns a dict: runs need --reward-key, one of {', '.join(sorted(map(str, value)))}")
        if isinstance(value, dict) and key is not None:
            trial.require(
                key in value,
                f"--reward-key {key} is not among {sorted(map(str, value))}",
                sample=sample,
                field="reward",
            )
    trial.require(len(kinds) == 1, "returned a number for some samples and a dict, or other names, for others")


@case("reward_post_process")
def _reward_post_process(trial: Trial) -> None:
    def process(samples: list[Sample]) -> None:
        given = list(samples)
        before = Untouched(samples, ("prompt", "label", "group_index", "index", "rollout_id", "tokens", "reward"))
        result = trial.call(trial.args, given)
        trial.require(
            isinstance(result, tuple | list) and len(result) == 2,  # noqa: PLR2004  the stub's pair
            f"returned {type(result).__name__}, not (raw_rewards, rewards)",
        )
        for name, column in zip(("raw_rewards", "rewards"), result, strict=True):
            values = column.tolist() if hasattr(column, "tolist") else column
            trial.require(isinstance(values, list | tuple), f"returned {type(values).__name__} as {name}, not a list")
            trial.require(len(values) == len(samples), f"returned {len(values)} {name} for {len(samples)} samples")
            for sample, value in zip(samples, values, strict=True):
                trial.number(value, name, sample)
        trial.require([*map(id, given)] == [*map(id, samples)], "reordered, added or removed samples in its list")
        before.require(trial)

    with trial.check("keeps one raw reward and one reward a sample"):
        process(trial.maker.scored(1.0, 0.0, 1.0))
    with trial.check("takes groups of different sizes, groups of one, fan-outs and removed samples"):
        process(flatten(trial.maker.rollout()))
    with trial.check("takes a group in which all rewards are equal"):
        process(trial.maker.scored(0.0, 0.0, 0.0))
    with trial.check("takes a single sample"):
        process(trial.maker.scored(1.0))
