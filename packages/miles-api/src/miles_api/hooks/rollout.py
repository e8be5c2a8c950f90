"""Rollout hooks: where prompts come from and how groups of samples are produced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from miles_api.spec import hook, second_form

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import (
        GenerateFnInput,
        GenerateFnOutput,
        Group,
        RolloutFnConstructorInput,
        RolloutFnEvalInput,
        RolloutFnEvalOutput,
        RolloutFnTrainInput,
        RolloutFnTrainOutput,
    )
    from miles_api.sample import Sample


@hook(
    flag="--rollout-function-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    default="the built-in rollout loop",
)
def rollout(
    args: Args, rollout_id: int, data_source: Any, evaluation: bool = False, /
) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
    """Produce one whole rollout, or one evaluation when `evaluation` is true.

    Called once per rollout, in the rollout process. It takes prompts from `data_source`, generates, scores and filters,
    and returns `rollout_batch_size` groups. A bare `list[list[Sample]]`, or in evaluation a bare dict, is wrapped.
    `miles_rollout.own_loop` has the parts of the default loop.
    """
    raise NotImplementedError


@second_form("rollout", name="class")
class RolloutFn(Protocol):
    """The class form: built once from `RolloutFnConstructorInput`, then called for each rollout."""

    def __init__(self, input: RolloutFnConstructorInput, /) -> None: ...  # noqa: A002

    def __call__(
        self,
        input: RolloutFnTrainInput | RolloutFnEvalInput,  # noqa: A002
        /,
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput: ...


@hook(
    flag="--eval-function-path",
    since=(1, 0),
    side="rollout",
    moment="eval",
    either_color=True,
    default="the configured rollout hook",
    shares="rollout",
)
def eval_rollout(args: Args, rollout_id: int, data_source: Any, evaluation: bool = True, /) -> RolloutFnEvalOutput:
    """Produce one evaluation; `evaluation` is always true.

    Called every `--eval-interval` rollouts, in the rollout process, instead of the rollout hook.
    """
    raise NotImplementedError


@second_form("eval_rollout", name="class")
class EvalRolloutFn(RolloutFn, Protocol):
    """The class form, as for the rollout hook."""


@hook(
    flag="--custom-generate-function-path",
    since=(1, 0),
    side="rollout",
    moment="rollout",
    either_color=True,
    default="single turn",
)
async def generate(
    args: Args, sample: Sample, sampling_params: dict[str, Any], /, *, evaluation: bool = False
) -> Sample | list[Sample]:
    """Generate the response of one sample: fill its tokens, response, log-probs and status.

    Called once per sample, concurrently, up to the engines' concurrency. `sampling_params` is a fresh dict. Returning
    a list fans the sample out: each item becomes a sample of its own in the same group. Items that share a `rollout_id`
    are parts of one trajectory and count once; others get an `index` and a `rollout_id` of their own. A reward set here
    is kept.
    """
    raise NotImplementedError


@second_form("generate", name="input")
async def generate_input(input: GenerateFnInput, /) -> GenerateFnOutput:  # noqa: A002
    """The one-argument form, which also reaches the rollout's state: tokenizer, semaphore and `post`."""
    raise NotImplementedError


@hook(
    flag="--data-source-path",
    since=(1, 0),
    side="rollout",
    moment="start",
    name="data_source",
    kind="class",
    default="RolloutDataSourceWithBuffer: a JSONL file, with a buffer of returned groups",
)
class DataSource(Protocol):
    """Hand out prompts as groups of pending samples, and take unfinished groups back.

    Built once in the rollout process; its methods are called there, one at a time.
    """

    def __init__(self, args: Args, /) -> None: ...

    def get_samples(self, num_samples: int, /) -> list[list[Sample]]:
        """Return `num_samples` groups of `n_samples_per_prompt` samples each."""
        ...

    def add_samples(self, samples: list[Group], /) -> None:
        """Take groups back, to be handed out again first."""
        ...

    def save(self, rollout_id: int, /) -> None:
        """Write the position and the buffer below `args.save`, a staging directory renamed with the checkpoint."""
        ...

    def load(self, rollout_id: int | None = None, /) -> None:
        """Restore what `save` wrote, from `args.load`."""
        ...
