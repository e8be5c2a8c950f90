"""An engine that samples from another policy than the trainer computes: at a temperature of its own, on purpose."""

from typing import Annotated

import msgspec

from miles_api.loading.load import provider
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput


class HotterOptions(msgspec.Struct, frozen=True, kw_only=True):
    engine_temperature: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """Temperature at which the engine samples for training; the trainer takes --rollout-temperature for it."""


async def generate(input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
    """Generate as the default does, hotter; evaluation stays as it is."""
    if not input.evaluation:
        input.sampling_params["temperature"] = input.args.engine_temperature
    return await provider("miles.defaults", "generate")(input)


generate.options = HotterOptions
