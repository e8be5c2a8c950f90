"""What rollout, generate and filter hooks take and return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from miles_api.args import Args
from miles_api.sample import Sample

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Sequence

__all__ = [
    "DynamicFilterOutput",
    "GenerateFnInput",
    "GenerateFnOutput",
    "GenerateState",
    "Group",
    "RolloutFnConstructorInput",
    "RolloutFnEvalInput",
    "RolloutFnEvalOutput",
    "RolloutFnTrainInput",
    "RolloutFnTrainOutput",
    "flatten",
]

Group = list[Sample | list[Sample]]
"""The samples of one prompt; a generation that fanned out stands as a list in place of its sample."""


def flatten(groups: Sequence[Group] | Sequence[list[Sample]]) -> list[Sample]:
    """Return all samples of `groups`, fan-outs opened, in order."""
    return [s for group in groups for item in group for s in (item if isinstance(item, list) else [item])]


class GenerateState(Protocol):
    """What the running rollout offers to every generation."""

    args: Args
    tokenizer: Any
    processor: Any
    sampling_params: dict[str, Any]
    """The training defaults; a hook gets a fresh copy for each call."""
    generate_fn_semaphore: asyncio.Semaphore
    """Bounds how many generations run at once."""
    aborted: bool
    """True once the rollout stops: finish early, keep what there is."""

    def __new__(cls, *_: Any, **__: Any) -> GenerateState:
        """Refuse to be built from `args`, as in older stacks: there is one, of the rollout that runs."""
        if cls is GenerateState:
            raise TypeError(
                "GenerateState is not built: a generate hook has it as `input.state`, a rollout hook gets it by "
                "`miles_rollout.own_loop.state_of(args)`"
            )
        return super().__new__(cls)

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """POST JSON to the router and return the decoded reply; raise `ServiceError` with status and body."""
        ...


class RolloutFnConstructorInput(msgspec.Struct, kw_only=True):
    """What the class form of a rollout hook is built from, once."""

    args: Args
    data_source: Any


class RolloutFnTrainInput(msgspec.Struct, kw_only=True):
    """One call for a training rollout."""

    rollout_id: int
    weight_version: str = ""

    @property
    def evaluation(self) -> bool:
        return False


class RolloutFnEvalInput(msgspec.Struct, kw_only=True):
    """One call for an evaluation."""

    rollout_id: int
    weight_version: str = ""
    hf_dir: str | None = None
    """A Hugging Face directory of the evaluated weights, where one was written."""

    @property
    def evaluation(self) -> bool:
        return True


class RolloutFnTrainOutput(msgspec.Struct):
    """The groups of one rollout and scalars about how they came to be."""

    samples: list[Group]
    metrics: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = self.metrics or {}


class RolloutFnEvalOutput(msgspec.Struct):
    """`data`: `{dataset: {"rewards": [...], "truncated": [...], "samples": [...]}}`."""

    data: dict[str, dict[str, Any]]
    metrics: dict[str, float] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.metrics = self.metrics or {}


class GenerateFnInput(msgspec.Struct, kw_only=True):
    """One generation in the one-argument form of the generate hook."""

    state: Any
    """A `GenerateState`."""
    sample: Sample
    sampling_params: dict[str, Any]
    evaluation: bool = False
    args: Args = None  # type: ignore[assignment]  filled in below
    """The hook's own view of the options; `state.args` for a caller that names none."""

    def __post_init__(self) -> None:
        if self.args is None:
            self.args = self.state.args


class GenerateFnOutput(msgspec.Struct):
    """The finished sample, or several when the generation fanned out."""

    samples: Sample | list[Sample]


class DynamicFilterOutput(msgspec.Struct):
    """Whether a group stays in the rollout; dropped groups are counted by `reason`."""

    keep: bool
    reason: str | None = None

    def __post_init__(self) -> None:
        # A comparison of tensors gives a tensor of one truth value.
        if hasattr(self.keep, "item"):
            self.keep = bool(self.keep.item())
