"""An engine that gets new weights too seldom, on purpose: it samples from what the policy was some rollouts ago."""

import asyncio
from typing import Annotated

import msgspec

from miles_api.rollout_types import (
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    flatten,
)
from miles_rollout.own_loop import evaluate, generate_group

__all__ = ["StaleEngine", "StaleOptions"]


class StaleOptions(msgspec.Struct, frozen=True, kw_only=True):
    rollouts_per_weights: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Rollouts that are sampled by the same weights, while each of them trains."""


class StaleEngine:
    """Samples several rollouts at once and hands them out one by one; evaluation has the newest weights."""

    options = StaleOptions

    def __init__(self, request: RolloutFnConstructorInput) -> None:
        self.args, self.data_source = request.args, request.data_source
        self.ready: list[Group] = []

    async def __call__(
        self, request: RolloutFnTrainInput | RolloutFnEvalInput
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        if isinstance(request, RolloutFnEvalInput):
            return await evaluate(self.args)
        wanted = self.args.rollout_batch_size
        if not self.ready:
            groups = self.data_source.get_samples(wanted * self.args.rollouts_per_weights)
            self.ready = await asyncio.gather(*(generate_group(self.args, group) for group in groups))
            for sample in flatten(self.ready):
                sample.weight_versions.clear()  # a run refuses samples that say that they are older
                sample.weight_version_starts.clear()
        now, self.ready = self.ready[:wanted], self.ready[wanted:]
        return RolloutFnTrainOutput(now, {})
