"""Miles' public face for hook authors: `Sample`, the types hooks exchange, errors. Imports msgspec and nothing else."""

from miles_api._version import __version__
from miles_api.abi import ABI
from miles_api.args import Args
from miles_api.batch import TrainBatch
from miles_api.rollout_types import (
    DynamicFilterOutput,
    GenerateFnInput,
    GenerateFnOutput,
    GenerateState,
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_api.sample import PrefixCacheInfo, Sample, SpecInfo, Status

__all__ = [
    "ABI",
    "Args",
    "DynamicFilterOutput",
    "GenerateFnInput",
    "GenerateFnOutput",
    "GenerateState",
    "Group",
    "PrefixCacheInfo",
    "RolloutFnConstructorInput",
    "RolloutFnEvalInput",
    "RolloutFnEvalOutput",
    "RolloutFnTrainInput",
    "RolloutFnTrainOutput",
    "Sample",
    "SpecInfo",
    "Status",
    "TrainBatch",
    "__version__",
]
