"""One group from prompts to scores: generate every sample, then score it; the same for training and evaluation."""

from __future__ import annotations

import asyncio
import itertools
import math
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput, Group, flatten
from miles_rollout.failures import HookFailed, named
from miles_rollout.generate.turn import TAKES_LAST_REWARD
from miles_rollout.interrupts import is_done, is_unfinished
from miles_rollout.pristine import copied, copy_sample, without_response
from miles_rollout.results import checked_generation, checked_reward, checked_samples

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample
    from miles_rollout.state import State

__all__ = ["gather", "run_group"]


async def run_group(state: State, group: Group, pristine: Group | None, *, evaluation: bool = False) -> Group:
    """Generate and score the samples of one prompt, concurrently.

    `pristine` is an untouched copy of `group`; None where only our own defaults see the samples. Raises `HookFailed`
    when a hook fails for good on one of them: then nothing of the group is worth keeping.

    With `--partial-rollout` responses that are whole are not generated again, those that were cut go on, and a group
    that is interrupted comes back with what it has, without the scores that need more.
    """
    pairs = zip(group, pristine or itertools.repeat(None), strict=pristine is not None)
    results = await gather(*(_run_item(state, item, clean, evaluation) for item, clean in pairs))
    samples = flatten([results])
    if state.scores_groups(evaluation) and not _interrupted(state, samples):
        await _score_group(state, samples, evaluation)
    return results


def _interrupted(state: State, samples: list[Sample]) -> bool:
    return state.interrupts is not None and state.aborted and any(is_unfinished(sample) for sample in samples)


async def gather(*coroutines: Coroutine[Any, Any, Any]) -> list[Any]:
    """Gather, and cancel the others when one fails, so that nothing runs on behind an error."""
    tasks = [asyncio.ensure_future(coroutine) for coroutine in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        this = asyncio.current_task()
        # A cancellation of this task was passed on already; a second one would cut short what hooks clean up.
        if not (this and this.cancelling()):
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def _run_item(
    state: State, item: Sample | list[Sample], pristine: Any, evaluation: bool
) -> Sample | list[Sample]:
    if isinstance(item, list):
        pairs = zip(item, pristine or itertools.repeat(None), strict=pristine is not None)
        return list(await gather(*(_run_item(state, one, clean, evaluation) for one, clean in pairs)))
    async with state.generate_fn_semaphore:
        result = await _whole(state, item, pristine, evaluation)
    made = result if isinstance(result, list) else [result]
    if not state.scores_groups(evaluation) and not _interrupted(state, made):
        await _score_made(state, made, evaluation)
    return result


async def _whole(state: State, sample: Sample, pristine: Sample | None, evaluation: bool) -> Sample | list[Sample]:
    """Generate, unless that was done in an earlier rollout or this one has enough."""
    if state.interrupts is not None and not evaluation and (state.aborted or is_done(sample)):
        return sample
    return await _generate(state, sample, pristine, evaluation)


async def _score_made(state: State, samples: list[Sample], evaluation: bool) -> None:
    """Score what one generation made; the earlier stretches of a conversation take the reward of its end."""
    last = samples[-1]
    for sample in samples:
        if sample is last or not sample.metadata.get(TAKES_LAST_REWARD):
            await _score(state, sample, evaluation)
    for sample in samples:
        if sample.reward is None:
            sample.reward = copied(last.reward)


def _hook_for(state: State, name: str, sample: Sample, reference: str | None) -> BoundHook:
    """Return the sample's own hook, if it names one, else the run's."""
    hook = state.hooks.need(name)
    if reference is None:
        return hook
    hook.stats.skipped += 1
    try:
        return state.own_hook(name, reference)
    except Exception as error:
        raise HookFailed(hook, [sample], error) from error


async def _generate(state: State, sample: Sample, pristine: Sample | None, evaluation: bool) -> Sample | list[Sample]:
    hook = _hook_for(state, "generate", sample, sample.generate_function_path)
    try:
        return await _generate_once(state, hook, sample, evaluation)
    except Exception as error:
        first = error

    def anew() -> Coroutine[Any, Any, Sample | list[Sample]]:
        given = without_response(sample) if pristine is None else copy_sample(pristine)
        return _generate_once(state, hook, given, evaluation)

    return await state.guard.again(hook, [pristine or sample], first, anew, fresh=True)


async def _generate_once(state: State, hook: BoundHook, sample: Sample, evaluation: bool) -> Sample | list[Sample]:
    shared = state.eval_sampling_params if evaluation else state.sampling_params
    # Our own generation changes neither these nor options.
    params, view = (copied(shared), hook.view or state.args) if hook.configured else (dict(shared), state.args)
    if hook.form.name == "input":
        request = GenerateFnInput(state=state, sample=sample, sampling_params=params, evaluation=evaluation, args=view)
        result = await state.guard.once(hook, request)
        result = result.samples if isinstance(result, GenerateFnOutput) else result
    else:
        result = await state.guard.once(hook, state.args, sample, params, evaluation=evaluation)
    # Our own generation keeps its samples consistent by construction.
    if not hook.configured:
        return result
    with state.guard.judging(hook):
        result = checked_generation(result, sample, named(hook))
        for made in result if isinstance(result, list) else [result]:
            if made.reward is not None:
                made.reward = checked_reward(made.reward, made, named(hook), state.reward_key(evaluation))
    return result


async def _score(state: State, sample: Sample, evaluation: bool) -> None:
    if sample.reward is not None:
        state.hooks.need("reward").stats.skipped += 1
        return
    hook = _hook_for(state, "reward", sample, sample.custom_rm_path)
    before = state.guard.before(hook, [sample])
    try:
        sample.reward = await _score_once(state, hook, sample, evaluation)
        return
    except Exception as error:
        first = error

    def one() -> Coroutine[Any, Any, float | dict[str, float]]:
        return _score_once(state, hook, sample, evaluation)

    sample.reward = await state.guard.again(hook, [sample], first, one, before=before)


async def _score_once(state: State, hook: BoundHook, sample: Sample, evaluation: bool) -> float | dict[str, float]:
    value = await state.guard.once(hook, state.args, sample)
    if not hook.configured and type(value) is float and math.isfinite(value):
        return value
    with state.guard.judging(hook):
        checked_samples([sample], named(hook))
        return checked_reward(value, sample, named(hook), state.reward_key(evaluation))


async def _score_group(state: State, samples: list[Sample], evaluation: bool) -> None:
    hook = state.hooks.one("group_reward")
    own = [sample for sample in samples if hook is None or sample.custom_rm_path is not None]
    await gather(*(_score(state, sample, evaluation) for sample in own if sample.reward is None))
    if hook is None:
        return
    if all(sample.reward is not None for sample in samples):
        hook.stats.skipped += 1
        return

    async def one() -> list[Any]:
        # A list of its own: what the hook adds to it or takes out of it is not the group.
        values = await state.guard.once(hook, state.args, list(samples))
        with state.guard.judging(hook):
            checked_samples(samples, named(hook))
            if hasattr(values, "tolist"):
                values = values.tolist()
            if not isinstance(values, list | tuple) or len(values) != len(samples):
                raise HookResultError(
                    f"{named(hook)} returned {values!r:.200} for the {len(samples)} samples of group "
                    f"{samples[0].group_index}"
                )
            key = state.reward_key(evaluation)
            return [checked_reward(v, s, named(hook), key) for v, s in zip(values, samples, strict=True)]

    for sample, value in zip(samples, await state.guard.attempt(hook, samples, one), strict=True):
        if sample.reward is None:
            sample.reward = value
