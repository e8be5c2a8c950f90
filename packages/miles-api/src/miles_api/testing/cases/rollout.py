"""Do rollouts, generations and data sources give whole groups of sound samples, and lose none?"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from miles_api.rollout_types import (
    GenerateFnInput,
    GenerateFnOutput,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    flatten,
)
from miles_api.sample import Sample, Status
from miles_api.testing.case import case
from miles_api.testing.state import MemorySource, State
from miles_api.testing.untouched import IDENTITY, Untouched

if TYPE_CHECKING:
    from miles_api.testing.trial import Trial

__all__: list[str] = []

_VERSION = "1"


@case("generate", left_out="what your model says: the engine here repeats the beginning of the prompt")
def _generate(trial: Trial) -> None:
    state = State(trial.args, trial.engine)

    def generate(count: int, *, evaluation: bool = False) -> None:
        prompts = trial.maker.prompts(1, count)[0]
        before, shared = Untouched(prompts, IDENTITY), copy.deepcopy(state.sampling_params)
        own = [dict(state.sampling_params) for _ in prompts]
        calls: list[tuple[Any, ...]]
        if trial.hook.form.name == "input":
            calls = [
                (
                    GenerateFnInput(
                        state=state, sample=sample, sampling_params=params, evaluation=evaluation, args=trial.args
                    ),
                )
                for sample, params in zip(prompts, own, strict=True)
            ]
            results = trial.together(calls)
        else:
            calls = [(trial.args, sample, params) for sample, params in zip(prompts, own, strict=True)]
            results = trial.together(calls, evaluation=evaluation)
        seen: set[int] = set()
        for prompt, result in zip(prompts, results, strict=True):
            made = {id(one) for one in _require_generated(trial, prompt, result)}
            trial.require(not seen & made, "was returned for another prompt too", sample=prompt)
            seen |= made
        before.require(trial)
        same = state.sampling_params == shared
        trial.require(
            same, "changed a list inside sampling_params, which all generations share", field="sampling_params"
        )

    with trial.check("generates a response"):
        generate(1)
    with trial.check("generates several responses at once"):
        generate(4)
    with trial.check("generates in evaluation"):
        generate(1, evaluation=True)


def _require_generated(trial: Trial, prompt: Sample, result: Any) -> list[Sample]:
    """Return the finished sample, or its fan-out; fail unless `result` is one."""
    result = result.samples if isinstance(result, GenerateFnOutput) else result
    made = result if isinstance(result, list) else [result]
    trial.require(made, "returned an empty list: a fan-out has at least one sample", sample=prompt)
    for one in made:
        wrong = f"returned a {type(one).__name__}, not a Sample or a list of them"
        trial.require(isinstance(one, Sample), wrong, sample=prompt)
    trial.sound(made)
    trial.require(
        len({id(one) for one in made}) == len(made), "returned one Sample object twice: copy it", sample=prompt
    )
    for one in made:
        same = one.group_index == prompt.group_index
        trial.require(same, f"moved the sample to group {one.group_index}", sample=prompt, field="group_index")
        finished = one.status != Status.PENDING or one.response_length > 0
        trial.require(finished, "is pending and has no response", sample=one, field="status")
        trial.require(len(one.tokens) > one.response_length, "has no prompt token", sample=one, field="tokens")
    return made


@case("rollout", acts=True, left_out="your data, your model and how fast it is")
def _rollout(trial: Trial) -> None:
    source = _built(trial)
    seen: set[int] = set()
    for rollout_id, which in ((0, "a rollout"), (1, "the next rollout")):
        with trial.check(f"produces {which}"):
            groups = _train(trial, source, rollout_id)
            fresh = [id(sample) for sample in flatten(groups)]
            trial.require(len(set(fresh)) == len(fresh), "returned one Sample object in two places: copy it")
            trial.require(not seen.intersection(fresh), "returned a Sample object of the rollout before")
            seen |= set(fresh)
            # Kept alive, so that no later object has the id of an earlier one.
            source.kept.append(groups)
    if trial.args.eval_interval is not None:
        with trial.check("evaluates"):
            _evaluate(trial, source)


@case("eval_rollout", acts=True, left_out="your data and your model")
def _eval_rollout(trial: Trial) -> None:
    source = _built(trial)
    with trial.check("evaluates"):
        _evaluate(trial, source)


class _Source(MemorySource):
    kept: list[Any]


def _built(trial: Trial) -> _Source:
    """Build the class form; return the data source that it was given."""
    source = _Source(trial.maker, trial.args.n_samples_per_prompt)
    source.kept = []
    if trial.hook.constructs:
        with trial.check("is built"):
            trial.build(RolloutFnConstructorInput(args=trial.args, data_source=source))
    return source


def _asked(trial: Trial, source: MemorySource, request: RolloutFnTrainInput | RolloutFnEvalInput) -> Any:
    if isinstance(trial.hook.form.stub, type):
        return trial.call(request)
    return trial.call(trial.args, request.rollout_id, source, request.evaluation)


def _train(trial: Trial, source: MemorySource, rollout_id: int) -> list[Any]:
    output = _asked(trial, source, RolloutFnTrainInput(rollout_id=rollout_id, weight_version=_VERSION))
    output = RolloutFnTrainOutput(samples=output) if isinstance(output, list) else output
    shape = isinstance(output, RolloutFnTrainOutput)
    trial.require(shape, f"returned a {type(output).__name__}, not RolloutFnTrainOutput or a list of groups")
    groups = output.samples
    whole = isinstance(groups, list) and all(isinstance(group, list) and group for group in groups)
    trial.require(whole, "returned something else than a list of groups, each a list of Samples")
    wanted = trial.args.rollout_batch_size
    trial.require(len(groups) == wanted, f"returned {len(groups)} groups; --rollout-batch-size is {wanted}")
    samples = flatten(groups)
    trial.sound(samples)
    for field in ("group_index", "index", "rollout_id"):
        lacking = sum(getattr(sample, field) is None for sample in samples)
        trial.require(lacking in (0, len(samples)), f"is missing for {lacking} of {len(samples)} samples", field=field)
    for sample in samples:
        trial.require(sample.status != Status.PENDING, "is still pending", sample=sample, field="status")
        trial.require(sample.reward is not None, "was not scored", sample=sample, field="reward")
        # A dict of rewards needs the key that trains.
        sample.get_reward_value(trial.args)
    _require_metrics(trial, output.metrics)
    return groups


def _evaluate(trial: Trial, source: MemorySource) -> None:
    output = _asked(trial, source, RolloutFnEvalInput(rollout_id=0, weight_version=_VERSION))
    output = RolloutFnEvalOutput(data=output) if isinstance(output, dict) else output
    shape = isinstance(output, RolloutFnEvalOutput) and isinstance(output.data, dict)
    trial.require(shape, f"returned a {type(output).__name__}, not RolloutFnEvalOutput or a dict of datasets")
    for name, part in output.data.items():
        columns = {key: part.get(key) for key in ("rewards", "truncated", "samples")}
        missing = [key for key, column in columns.items() if not isinstance(column, list)]
        trial.require(not missing, f"dataset {name} has no list of {', '.join(missing)}")
        sizes = {key: len(column) for key, column in columns.items() if column is not None}
        trial.require(len(set(sizes.values())) == 1, f"the columns of dataset {name} differ in length: {sizes}")
        trial.sound(part["samples"])
        for sample, value in zip(part["samples"], part["rewards"], strict=True):
            trial.number(value, "rewards", sample)
    _require_metrics(trial, output.metrics)


def _require_metrics(trial: Trial, metrics: Any) -> None:
    trial.require(isinstance(metrics, dict), f"gave metrics as a {type(metrics).__name__}, not a dict by name")
    for name, value in metrics.items():
        trial.number(value, f"the metric {name}")


@case("data_source", acts=True, left_out="how long your data lasts")
def _data_source(trial: Trial) -> None:
    cls = trial.hook
    with trial.check("is built"):
        source = trial.build(trial.args)
    handed: list[Sample] = []
    with trial.check("hands out groups of pending samples"):
        for count in (2, 1, 3):
            handed += flatten(_get(trial, source, count))
        numbers = [sample.index for sample in handed]
        trial.require(None not in numbers, "is missing: resumed runs and seeds need it", field="index")
        trial.require(len(set(numbers)) == len(numbers), "repeats: every sample of a run has its own", field="index")
    with trial.check("takes groups back and hands them out first"):
        back = [[*group] for group in trial.maker.prompts(1, trial.args.n_samples_per_prompt)]
        for sample in flatten(back):
            sample.metadata["returned"] = True
        trial.guarded(lambda: source.add_samples(back))
        again = flatten(_get(trial, source, 1))
        returned = all(sample.metadata.get("returned") for sample in again)
        trial.require(returned, "a group that was put back did not come first")
    with trial.check("goes on after save and load where it was"):
        trial.guarded(lambda: source.add_samples(back))
        trial.guarded(lambda: source.save(0))
        onwards = flatten(_get(trial, source, 3))
        trial.hook = cls
        resumed = trial.build(trial.args)
        trial.guarded(lambda: resumed.load(0))
        for expected, sample in zip(onwards, flatten(_get(trial, resumed, 3)), strict=True):
            for field in IDENTITY:
                same = getattr(sample, field) == getattr(expected, field)
                trial.require(same, f"is {getattr(sample, field)!r:.60} after load", sample=expected, field=field)
    if hasattr(source, "get_buffer_length"):
        with trial.check("says how many groups were put back"):
            length = trial.guarded(source.get_buffer_length)
            trial.require(isinstance(length, int), f"get_buffer_length() returned {length!r:.60}, not a whole number")


def _get(trial: Trial, source: Any, count: int) -> list[list[Sample]]:
    groups = trial.guarded(lambda: source.get_samples(count))
    size = trial.args.n_samples_per_prompt
    listed = isinstance(groups, list) and all(isinstance(group, list) for group in groups)
    trial.require(listed, "get_samples returned something else than a list of groups, each a list of Samples")
    trial.require(len(groups) == count, f"get_samples returned {len(groups)} groups; {count} were asked for")
    for number, group in enumerate(groups):
        found = f"group {number} has {len(group)} samples; --n-samples-per-prompt is {size}"
        trial.require(len(group) == size, found)
    samples = flatten(groups)
    trial.sound(samples)
    trial.require(
        len({id(sample) for sample in samples}) == len(samples), "handed out one Sample object twice: copy it"
    )
    for sample in samples:
        trial.require(sample.prompt, "is empty", sample=sample, field="prompt")
        trial.require(sample.status == Status.PENDING, f"is {sample.status!r}", sample=sample, field="status")
        group_index = sample.group_index
        trial.require(
            group_index is not None, "is missing: rewards are normalised by it", sample=sample, field="group_index"
        )
    return groups
