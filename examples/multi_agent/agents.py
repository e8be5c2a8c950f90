"""A team of agents, all the same model: solvers answer, rewriters improve on their answers, a selector picks one.

`generate` makes one prompt into the samples of a whole team; each is trained, with a reward of its own.
"""

import asyncio
import copy
from collections import defaultdict
from typing import Annotated

import msgspec

from miles_api import Args, GenerateFnInput, GenerateFnOutput, Sample
from miles_rollout.generate.single_turn import generate as answer
from miles_rollout.normalize import normalize_rewards

__all__ = ["TeamOptions", "generate", "log_evaluation", "log_roles", "normalize_by_role"]

ROLES = ("solver", "rewriter", "selector")


class TeamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How large a team is, and what its success is worth to its members."""

    solvers: Annotated[int, msgspec.Meta(ge=1)] = 2
    """Agents that answer on their own."""
    rewriters: Annotated[int, msgspec.Meta(ge=1)] = 4
    """Agents that see all solvers' answers and write one of their own; the selector picks one of theirs."""
    right_weight: float = 1.2
    """A member's reward is multiplied by this if the answer that the selector picked is right,"""
    wrong_weight: float = 0.8
    """and by this if it is not."""


async def generate(request: GenerateFnInput) -> GenerateFnOutput:
    """Let a team work on `sample.prompt`, the digits to sort; return the samples of all its members.

    In evaluation the selector's alone: its reward says whether the team's answer is right.
    """
    digits, options = request.sample.prompt, request.args
    solvers = await ask(request, "solver", [f"sort {digits}>"] * options.solvers, 0)
    seen = " ".join(sample.response for sample in solvers)
    rewriters = await ask(request, "rewriter", [f"fix {digits} {seen}>"] * options.rewriters, options.solvers)
    seen = " ".join(sample.response for sample in rewriters)
    [selector] = await ask(request, "selector", [f"pick {digits} {seen}>"], options.solvers + options.rewriters)
    for sample in (*solvers, *rewriters):
        sample.reward = {"right": float(sample.response == sample.label)}
    score_choice(selector, rewriters)
    team = [*solvers, *rewriters, selector]
    weight = options.right_weight if selector.reward["right"] else options.wrong_weight
    for sample in team:
        sample.reward["weighted"] = weight * sample.reward["right"]
    if request.evaluation:
        selector.metadata["team"] = {role: share(team, role) for role in ("solver", "rewriter")}
        return GenerateFnOutput(samples=selector)
    return GenerateFnOutput(samples=team)


async def ask(request: GenerateFnInput, role: str, prompts: list[str], first: int) -> list[Sample]:
    """Let one agent answer each prompt; `first` is the number of the first of them in its team."""
    samples = []
    for number, prompt in enumerate(prompts, first):
        sample = copy.deepcopy(request.sample)
        # Numbers of its own: it is drawn with a seed of its own, and counts as a trajectory of its own.
        size = request.args.solvers + request.args.rewriters + 1
        sample.index = sample.rollout_id = request.sample.index * size + number
        sample.prompt, sample.metadata["role"] = prompt, role
        samples.append(sample)
    requests = [msgspec.structs.replace(request, sample=sample) for sample in samples]
    await asyncio.gather(*(answer(one) for one in requests))
    return samples


def score_choice(selector: Sample, rewriters: list[Sample]) -> None:
    """Score a selector by the answer that it picked: is it a right one of the rewriters'?

    Where none of theirs is right there was nothing to win, and there is nothing to learn.
    """
    rewards = {sample.response: sample.reward["right"] for sample in rewriters}
    selector.reward = {"right": rewards.get(selector.response, 0.0)}
    selector.metadata["chance"] = share(rewriters, "rewriter")
    selector.remove_sample = selector.metadata["chance"] == 0.0


def normalize_by_role(args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
    """Compare each sample with its peers: the same role for the same prompt, in all the prompt's teams.

    The default would compare a selector with solvers, whose task is another. Selectors that had nothing to win are
    nobody's peers.
    """
    peers = defaultdict(list)
    for place, sample in enumerate(samples):
        if not sample.remove_sample:
            peers[sample.metadata.get("role")].append(place)
    rewards = [0.0] * len(samples)
    for places in peers.values():
        _, own = normalize_rewards(args, [samples[place] for place in places])
        for place, reward in zip(places, own, strict=True):
            rewards[place] = reward
    return [sample.get_reward_value(args) for sample in samples], rewards


def share(samples: list[Sample], role: str) -> float:
    """Return the share of a role's samples that is right."""
    own = [sample.reward["right"] for sample in samples if sample.metadata["role"] == role]
    return sum(own) / len(own)


def log_roles(
    rollout_id: int, args: Args, samples: list[Sample], rollout_extra_metrics: dict[str, float], rollout_time: float
) -> bool:
    """Add each role's share of right samples to the metrics, and how well selectors choose where they have a choice."""
    for role in ROLES:
        rollout_extra_metrics[f"agents/{role}"] = share(samples, role)
    chose = [s for s in samples if s.metadata["role"] == "selector" and 0 < s.metadata["chance"] < 1]
    rollout_extra_metrics["agents/choices"] = float(len(chose))
    if chose:
        rollout_extra_metrics["agents/choice"] = share(chose, "selector")
        rollout_extra_metrics["agents/choice_by_chance"] = sum(s.metadata["chance"] for s in chose) / len(chose)
    return False


def log_evaluation(rollout_id: int, args: Args, data: dict, extra_metrics: dict[str, float]) -> bool:
    """Add what solvers and rewriters alone would have got on the held-out prompts."""
    for name, part in data.items():
        for role in ("solver", "rewriter"):
            shares = [sample.metadata["team"][role] for sample in part["samples"]]
            extra_metrics[f"eval/{name}/{role}"] = sum(shares) / len(shares)
    return False


generate.options = TeamOptions
