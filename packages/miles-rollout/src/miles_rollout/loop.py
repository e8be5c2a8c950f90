"""The default rollout: keep the engines full until enough groups are kept, then stop."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any

from miles_api.errors import ConfigError, HookResultError
from miles_api.hookset import HookSet
from miles_api.options import options_from
from miles_api.rollout_types import (
    DynamicFilterOutput,
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
)
from miles_rollout.evaluate import evaluate
from miles_rollout.group import flatten, run_group
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.options import RolloutOptions
from miles_rollout.state import State

if TYPE_CHECKING:
    from miles_api.args import Args

__all__ = ["InferenceRollout"]


class InferenceRollout:
    """Generate, score and filter groups concurrently; what is left over when enough are kept goes to the buffer."""

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        args: Args = input.args
        self._args = args
        self._data_source = input.data_source
        self._hooks = HookSet(args, CALLED_BY_LOOP)
        self._state = State(args, self._hooks)
        self._options: RolloutOptions = options_from(args, RolloutOptions)
        self._everything: list[Group] = []
        self._dropped: Counter[str] = Counter()

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks ran, for `hooks.json`."""
        return self._hooks.report()

    async def __call__(
        self,
        input: RolloutFnTrainInput | RolloutFnEvalInput,  # noqa: A002
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        if isinstance(input, RolloutFnEvalInput):
            return await evaluate(self._state)
        self._everything, self._dropped = [], Counter()
        self._state.aborted = False
        kept = await self._collect(self._args.rollout_batch_size)
        kept.sort(key=lambda group: flatten([group])[0].group_index or 0)
        for hook in self._hooks.many("all_samples_process"):
            await hook.acall(self._state.executor, self._args, self._everything, self._data_source)
        metrics = {f"rollout/dropped/{reason}": float(n) for reason, n in self._dropped.items()}
        return RolloutFnTrainOutput(samples=kept, metrics=metrics)

    async def aclose(self) -> None:
        """Close connections."""
        await self._state.close()

    async def _collect(self, target: int) -> list[Group]:
        kept: list[Group] = []
        running: dict[asyncio.Task[Group], Group] = {}
        first = max(self._options.over_sampling_batch_size or target, target)
        try:
            while len(kept) < target:
                missing = (first if not self._everything else target) - len(kept) - len(running)
                for group in self._data_source.get_samples(missing) if missing > 0 else []:
                    running[asyncio.ensure_future(run_group(self._state, group))] = group
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    group = task.result()
                    del running[task]
                    self._everything.append(group)
                    if await self._keeps(group):
                        kept.append(group)
                self._require_progress(target)
        finally:
            await self._put_back(running)
        self._data_source.add_samples(kept[target:])
        return kept[:target]

    async def _keeps(self, group: Group) -> bool:
        samples = flatten([group])
        for hook in self._hooks.many("dynamic_filter"):
            verdict = await hook.acall(self._state.executor, self._args, samples)
            if isinstance(verdict, bool):
                verdict = DynamicFilterOutput(keep=verdict)
            # Filters written for other stacks return their own class of the same shape.
            if not isinstance(getattr(verdict, "keep", None), bool):
                raise HookResultError(f"dynamic_filter hook {hook.reference} returned {verdict!r}, not a verdict")
            if not verdict.keep:
                self._dropped[verdict.reason or hook.reference] += 1
                return False
        return True

    def _require_progress(self, target: int) -> None:
        if sum(self._dropped.values()) >= self._options.max_filter_attempts * target:
            counts = ", ".join(f"{reason}: {n}" for reason, n in self._dropped.most_common())
            raise ConfigError(
                f"--dynamic-sampling-filter-path dropped {sum(self._dropped.values())} groups in one rollout of "
                f"{target} ({counts}); --max-filter-attempts {self._options.max_filter_attempts} ends the run here"
            )

    async def _put_back(self, running: dict[asyncio.Task[Group], Group]) -> None:
        """Cancel what is not needed any more; its prompts start anew in the next rollout."""
        if not running:
            return
        self._state.aborted = True
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for group in running.values():
            for sample in flatten([group]):
                sample.reset_for_retry()
        self._data_source.add_samples(list(running.values()))
