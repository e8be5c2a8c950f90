"""A whole rollout as a class, which remembers: prompts that are too hard now come back when the model is better.

Generation, scoring and evaluation are those of the run, with its hooks; which groups train is decided here.
"""

import asyncio
from typing import Any

from miles_api import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    Sample,
)
from miles_rollout.own_loop import evaluate, generate_group

__all__ = ["Curriculum"]

WAIT = 10
"""Rollouts until a prompt that nobody solved is asked again."""
ROUNDS = 4


class Curriculum:
    """Built once; called for each rollout and each evaluation."""

    def __init__(self, request: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = request.args, request.data_source
        self.later: list[tuple[int, list[Sample]]] = []
        """Groups that wait, with the rollout for which they do; in that order."""

    async def __call__(
        self, request: RolloutFnTrainInput | RolloutFnEvalInput
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        if isinstance(request, RolloutFnEvalInput):
            return await evaluate(self.args)
        wanted, rollout_id = self.args.rollout_batch_size, request.rollout_id
        kept, solved, unsolved = [], [], []
        for _ in range(ROUNDS):
            groups = self.draw(wanted - len(kept), rollout_id)
            for group in await asyncio.gather(*(generate_group(self.args, group) for group in groups)):
                rewards = [sample.reward for sample in group]
                pile = kept if min(rewards) < max(rewards) else solved if max(rewards) > 0 else unsolved
                pile.append(group)
            if len(kept) == wanted:
                break
        # Equal rewards teach nothing; but a rollout has to be full.
        kept += [(solved or unsolved).pop() for _ in range(wanted - len(kept))]
        for group in unsolved:
            self.postpone(group, rollout_id + WAIT)
        metrics = {"rollout/solved_by_all": float(len(solved)), "rollout/postponed": float(len(self.later))}
        return RolloutFnTrainOutput(kept, metrics)

    def draw(self, count: int, rollout_id: int) -> list[list[Sample]]:
        """Return `count` groups: those that have waited long enough, then new prompts."""
        due = []
        while self.later and self.later[0][0] <= rollout_id and len(due) < count:
            due.append(self.later.pop(0)[1])
        return due + self.data_source.get_samples(count - len(due))

    def postpone(self, group: list[Sample], until: int) -> None:
        """Keep the prompts of a group; its answers are of weights that will be old by then."""
        for sample in group:
            sample.reset_for_retry()
        self.later.append((until, group))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps: a run that goes on has lost no prompt."""
        return {"later": [(until, [sample.to_dict() for sample in group]) for until, group in self.later]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.later = [(until, [*map(Sample.from_dict, group)]) for until, group in state["later"]]
