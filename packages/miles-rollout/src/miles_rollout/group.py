"""One group from prompts to scores: generate every sample, then score it; the same for training and evaluation."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError, SampleError
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput, Group
from miles_api.sample import Sample

if TYPE_CHECKING:
    from miles_api.bind import BoundHook
    from miles_rollout.state import State

__all__ = ["flatten", "gather", "run_group"]


def flatten(groups: list[Group]) -> list[Sample]:
    """Return all samples of `groups`, fan-outs opened, in order."""
    return [s for group in groups for item in group for s in (item if isinstance(item, list) else [item])]


async def run_group(state: State, group: Group, *, evaluation: bool = False) -> Group:
    """Generate and score the samples of one prompt, concurrently. A hook's exception ends the rollout."""
    results = await gather(*(_run_item(state, item, evaluation) for item in group))
    if _scores_groups(state, evaluation):
        await _score_group(state, flatten([results]))
    return results


async def gather(*coroutines: Any) -> list[Any]:
    """Gather, and cancel the others when one fails, so that nothing runs on behind an error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _scores_groups(state: State, evaluation: bool) -> bool:
    return state.rewards.eval_group_rm if evaluation else state.rewards.group_rm


async def _run_item(state: State, item: Sample | list[Sample], evaluation: bool) -> Sample | list[Sample]:
    if isinstance(item, list):
        return list(await gather(*(_run_item(state, one, evaluation) for one in item)))
    async with state.generate_fn_semaphore:
        result = await _generate(state, item, evaluation)
    if not _scores_groups(state, evaluation):
        for sample in result if isinstance(result, list) else [result]:
            await _score(state, sample)
    return result


async def _generate(state: State, sample: Sample, evaluation: bool) -> Sample | list[Sample]:
    _refuse_own_hooks(sample)
    hook = state.hooks.need("generate")
    params = dict(state.eval_sampling_params if evaluation else state.sampling_params)
    if hook.form.name == "input":
        request = GenerateFnInput(state=state, sample=sample, sampling_params=params, evaluation=evaluation)
        result = await hook.acall(state.executor, request)
        result = result.samples if isinstance(result, GenerateFnOutput) else result
    else:
        result = await hook.acall(state.executor, state.args, sample, params, evaluation=evaluation)
    for one in result if isinstance(result, list) else [result]:
        if not isinstance(one, Sample):
            raise HookResultError(
                f"{_named(hook)} returned {type(one).__name__} for sample {sample.index}, not a Sample"
            )
    return result


def _refuse_own_hooks(sample: Sample) -> None:
    for field in ("generate_function_path", "custom_rm_path"):
        if getattr(sample, field) is not None:
            raise SampleError(f"sample {sample.index} sets {field}, which this version does not call: use the flag")


async def _score(state: State, sample: Sample) -> None:
    if sample.reward is not None:
        sample.reward = _checked(state.hooks.need("generate"), sample, sample.reward)
        return
    hook = state.hooks.need("reward")
    sample.reward = _checked(hook, sample, await hook.acall(state.executor, state.args, sample))


async def _score_group(state: State, samples: list[Sample]) -> None:
    hook = state.hooks.one("group_reward")
    if hook is None or all(sample.reward is not None for sample in samples):
        for sample in samples:
            await _score(state, sample)
        return
    rewards = await hook.acall(state.executor, state.args, samples)
    if not isinstance(rewards, list | tuple) or len(rewards) != len(samples):
        raise HookResultError(
            f"{_named(hook)} returned {rewards!r} for the {len(samples)} samples of group {samples[0].group_index}"
        )
    for sample, value in zip(samples, rewards, strict=True):
        sample.reward = _checked(hook, sample, value)


def _checked(hook: BoundHook, sample: Sample, value: Any) -> float | dict[str, float]:
    """Accept numbers (NumPy and torch scalars too) and dicts of them; name hook and sample otherwise."""
    if isinstance(value, dict):
        return {str(key): _number(hook, sample, part) for key, part in value.items()}
    return _number(hook, sample, value)


def _number(hook: BoundHook, sample: Sample, value: Any) -> float:
    if type(value) not in (float, int, bool) and hasattr(value, "item"):
        value = value.item()
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise HookResultError(f"{_named(hook)} returned {value!r} for sample {sample.index}, not a finite number")
    return float(value)


def _named(hook: BoundHook) -> str:
    return f"{hook.spec.name} hook {hook.reference}"
