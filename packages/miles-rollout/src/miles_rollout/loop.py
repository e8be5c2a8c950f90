"""The default rollout: keep the engines full until enough groups are kept, then stop."""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from typing import TYPE_CHECKING, Any

from miles_api.errors import DataError, HookResultError, MilesError
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
        self._target: int = args.rollout_batch_size
        self._everything: list[Group] = []
        self._dropped: Counter[str] = Counter()

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks ran, for `hooks.json`."""
        return self._hooks.report()

    async def __call__(
        self,
        input: RolloutFnTrainInput | RolloutFnEvalInput,  # noqa: A002
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        self._state.aborted = False
        if isinstance(input, RolloutFnEvalInput):
            return await evaluate(self._state)
        self._everything, self._dropped = [], Counter()
        kept = await self._collect(self._target)
        kept.sort(key=lambda group: flatten([group])[0].group_index or 0)
        for hook in self._hooks.many("all_samples_process"):
            await hook.acall(self._state.executor, self._args, self._everything, self._data_source)
        metrics = {f"rollout/dropped/{reason}": float(n) for reason, n in self._dropped.items()}
        return RolloutFnTrainOutput(samples=kept, metrics=metrics)

    async def aclose(self) -> None:
        """Close connections, and hooks that can be closed."""
        await self._hooks.aclose()
        await self._state.close()

    async def _collect(self, target: int) -> list[Group]:
        kept: list[Group] = []
        running: dict[asyncio.Task[Group], Group] = {}
        first = max(self._options.over_sampling_batch_size or target, target)
        try:
            while len(kept) < target:
                missing = (first if not self._everything else target) - len(kept) - len(running)
                self._start(missing, running)
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    group = task.result()
                    self._everything.append(group)
                    # What finishes beyond the target stays among the running, whose prompts go back.
                    if len(kept) < target:
                        del running[task]
                        if await self._keeps(group):
                            kept.append(group)
                self._require_progress(target)
        finally:
            await self._put_back(running)
        return kept

    def _start(self, count: int, running: dict[asyncio.Task[Group], Group]) -> None:
        """Start `count` more groups; `running` keeps their prompts as they were handed out."""
        if count <= 0:
            return
        groups = self._data_source.get_samples(count)
        if not groups and not running:
            raise DataError("the data source handed out no group: a rollout cannot be filled")
        # Without filters and oversampling a group is left over only when the run fails: then no copy is worth its time.
        may_return = bool(self._hooks.many("dynamic_filter")) or self._options.over_sampling_batch_size is not None
        for group in groups:
            pristine = copy.deepcopy(group) if may_return else group
            running[asyncio.ensure_future(run_group(self._state, group))] = pristine

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
            raise MilesError(
                f"--dynamic-sampling-filter-path dropped {sum(self._dropped.values())} groups in one rollout of "
                f"{target} ({counts}); --max-filter-attempts {self._options.max_filter_attempts} ends the run here"
            )

    async def _put_back(self, running: dict[asyncio.Task[Group], Group]) -> None:
        """Cancel what is not needed any more; its prompts start anew in the next rollout.

        What goes back are copies taken before generation: a hook's thread may still write to the samples it was given.
        """
        if not running:
            return
        self._state.aborted = True
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._data_source.add_samples(list(running.values()))
