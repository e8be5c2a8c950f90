"""The default rollout: keep the engines full until enough groups are kept, then stop."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from miles_api.errors import DataError, MilesError, counted
from miles_api.loading.hookset import HookSet
from miles_api.options import options_from
from miles_api.rollout_types import (
    Group,
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnEvalOutput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    flatten,
)
from miles_rollout.evaluate import evaluate
from miles_rollout.failures import HookFailed, count_drop, named
from miles_rollout.group import run_group
from miles_rollout.hook_names import CALLED_BY_LOOP
from miles_rollout.interrupts import left_of
from miles_rollout.options import RolloutOptions
from miles_rollout.pristine import copy_group, without_response
from miles_rollout.results import checked_data, checked_samples, checked_verdict
from miles_rollout.state import State

if TYPE_CHECKING:
    from collections.abc import Collection

    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook

__all__ = ["InferenceRollout"]


class _Turn(NamedTuple):
    """A group under way."""

    group: Group
    """The samples that are being generated."""
    pristine: Group | None
    """A copy as they were handed out, which no hook sees; None where only our own defaults see `group`."""
    again: bool
    """Whether this is its second chance."""

    def unused(self) -> Group:
        """Return the group as it was handed out, to start over or to go back."""
        if self.pristine is not None:
            return self.pristine
        return [without_response(sample) for sample in flatten([self.group])]

    def left(self, task: asyncio.Task[Group]) -> Group:
        """Return the group as it came out of its interrupted `task`, to go on; as it was, if nothing came out."""
        if not task.done() or task.cancelled() or task.exception() is not None:
            return self.unused()
        return left_of(task.result(), self.unused())


class InferenceRollout:
    """Generate, score and filter groups concurrently; what is left over when enough are kept goes to the buffer.

    It starts anew in the next rollout; with `--partial-rollout` it goes on from where it was.
    """

    def __init__(self, input: RolloutFnConstructorInput) -> None:  # noqa: A002
        args: Args = input.args
        self._args = args
        self._data_source = input.data_source
        self._hooks = HookSet(args, CALLED_BY_LOOP)
        self._state = State(args, self._hooks)
        self._state.watchdog.add(hook for name in CALLED_BY_LOOP for hook in self._hooks.many(name))
        self._interrupts = self._state.interrupts
        self._options: RolloutOptions = options_from(args, RolloutOptions)
        self._target: int = args.rollout_batch_size
        self._in_order: bool = args.deterministic
        self._everything: list[Group] = []
        self._dropped: list[tuple[Group, str]] = []
        self._counts: Counter[str] = Counter()
        self._continued: Counter[str] = Counter()
        self._start_over: list[Group] = []
        self._returned: dict[int | None, bool] = {}
        """Groups in the buffer, by their first sample's index: whether they have had their first chance already."""

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks ran, for `hooks.json`."""
        return self._state.report()

    def dropped_groups(self) -> list[tuple[Group, str]]:
        """Return the groups that the last rollout generated and filtered out, with the reasons."""
        return self._dropped

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds of the loop: the error budget, and which groups had their first chance."""
        return {"budget": self._state.guard.budget.state_dict(), "returned": list(self._returned.items())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the run that is continued."""
        self._state.guard.budget.load_state_dict(state["budget"])
        self._returned = {index: bool(again) for index, again in state["returned"]}

    async def __call__(
        self,
        input: RolloutFnTrainInput | RolloutFnEvalInput,  # noqa: A002
    ) -> RolloutFnTrainOutput | RolloutFnEvalOutput:
        self._state.aborted = False
        with self._state.watchdog.watching():
            if isinstance(input, RolloutFnEvalInput):
                return await evaluate(self._state)
            return await self._train()

    async def _train(self) -> RolloutFnTrainOutput:
        self._everything, self._dropped, self._counts, self._start_over = [], [], Counter(), []
        self._continued = Counter(continued_samples=0, continued_tokens=0) if self._interrupts else Counter()
        kept = await self._collect(self._target)
        kept.sort(key=lambda group: flatten([group])[0].group_index or 0)
        for hook in self._hooks.many("all_samples_process"):
            await self._state.guard.once(hook, self._args, self._everything, self._data_source)
            with self._state.guard.judging(hook):
                checked_samples(flatten(kept), named(hook))
        metrics = {f"rollout/dropped/{reason}": float(n) for reason, n in self._counts.items()}
        metrics |= {f"rollout/{name}": float(n) for name, n in self._continued.items()}
        return RolloutFnTrainOutput(samples=kept, metrics=metrics | self._state.hook_metrics())

    async def aclose(self) -> None:
        """Close connections, and hooks that can be closed."""
        await self._state.close()

    async def _collect(self, target: int) -> list[Group]:
        kept: list[Group] = []
        running: dict[asyncio.Task[Group], _Turn] = {}
        first = max(self._options.over_sampling_batch_size or target, target)
        started = False
        try:
            while len(kept) < target:
                self._start((target if started else first) - len(kept) - len(running), running)
                started = True
                for task in await self._next_done(running):
                    # What finishes beyond the target stays among the running, whose prompts go back. What failed
                    # has had its chance.
                    if len(kept) == target and not isinstance(task.exception(), HookFailed):
                        continue
                    turn = running.pop(task)
                    try:
                        group = task.result()
                        keeps = await self._keeps(group)
                        # Not before: a group that its filter fails on comes again.
                        self._everything.append(group)
                        if keeps:
                            kept.append(group)
                            self._count_continued(turn)
                    except HookFailed as failure:
                        self._lose(turn, failure)
                self._require_progress(target)
            if self._in_order and running:
                # How far they get before they are cancelled, and which hooks they call, would be chance.
                await asyncio.wait(running)
            elif self._interrupts and running:
                self._state.aborted = True
                await self._interrupts.end(running, self._state.guard.grace)
        finally:
            await self._put_back(running)
        return kept

    def _count_continued(self, turn: _Turn) -> None:
        """Count the samples of a kept group that an earlier rollout began, and the tokens that were not made again."""
        if self._interrupts and turn.pristine is not None:
            begun = [sample.response_length for sample in flatten([turn.pristine]) if sample.response_length]
            self._continued.update(continued_samples=len(begun), continued_tokens=sum(begun))

    async def _next_done(self, running: dict[asyncio.Task[Group], _Turn]) -> Collection[asyncio.Task[Group]]:
        """Wait for the groups to judge next: those that end first or, with `--deterministic`, the oldest."""
        if self._in_order:
            oldest = next(iter(running))
            await asyncio.wait([oldest])
            return [oldest]
        return (await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))[0]

    def _start(self, count: int, running: dict[asyncio.Task[Group], _Turn]) -> None:
        """Start `count` more groups: those that start over, then new ones."""
        # At once even where enough are under way: what waited for the end would never be dropped.
        while self._start_over:
            self._run(self._start_over.pop(), running, again=True)
            count -= 1
        if count <= 0:
            return
        groups = self._data_source.get_samples(count)
        if not groups and not running:
            raise DataError("the data source handed out no group: a rollout cannot be filled")
        who = f"the data source {type(self._data_source).__name__}"
        for group in checked_data(groups, count, self._args.n_samples_per_prompt, who):
            again = self._returned.pop(_key(group), None) if self._returned else None
            if again is None:
                self._state.guard.budget.started += 1
            self._run(group, running, again=bool(again))

    def _run(self, group: Group, running: dict[asyncio.Task[Group], _Turn], *, again: bool = False) -> None:
        pristine = copy_group(group) if self._state.shows(group) else None
        running[asyncio.ensure_future(run_group(self._state, group, pristine))] = _Turn(group, pristine, again)

    async def _keeps(self, group: Group) -> bool:
        filters = self._hooks.many("dynamic_filter")
        for position, hook in enumerate(filters):
            verdict = await self._verdict(hook, flatten([group]))
            if not verdict.keep:
                reason = verdict.reason or hook.reference
                self._dropped.append((group, reason))
                self._counts[count_drop(hook, reason)] += 1
                for later in filters[position + 1 :]:
                    later.stats.skipped += 1
                return False
        return True

    async def _verdict(self, hook: BoundHook, samples: list[Any]) -> Any:
        guard = self._state.guard

        async def one() -> Any:
            verdict = await guard.once(hook, self._args, list(samples))
            with guard.judging(hook):
                checked_samples(samples, named(hook))
                return checked_verdict(verdict, named(hook))

        return await guard.attempt(hook, samples, one)

    def _lose(self, turn: _Turn, failure: HookFailed) -> None:
        """Let a group that a hook failed on start over, once; then drop it, as long as the error budget lasts."""
        if not turn.again:
            self._start_over.append(turn.unused())
            return
        self._counts[self._state.guard.drop(failure)] += 1

    def _require_progress(self, target: int) -> None:
        if len(self._dropped) >= self._options.max_filter_attempts * target:
            counts = ", ".join(f"{reason}: {n}" for reason, n in self._counts.most_common())
            raise MilesError(
                f"--dynamic-sampling-filter-path dropped {counted(len(self._dropped), 'group')} in one rollout of "
                f"{target} ({counts}); --max-filter-attempts {self._options.max_filter_attempts} ends the run here"
            )

    async def _put_back(self, running: dict[asyncio.Task[Group], _Turn]) -> None:
        """Cancel what is not needed any more; its prompts start anew in the next rollout, or go on in it.

        What goes back anew was never given to a hook, whose thread may still write to the samples it has. What goes on
        has come back from all its hooks.
        """
        if not running and not self._start_over:
            return
        self._state.aborted = True
        await self._state.guard.cancel(list(running))
        left = [turn.left(task) if self._interrupts else turn.unused() for task, turn in running.items()]
        back = list(zip(left, (turn.again for turn in running.values()), strict=True))
        back += [(group, True) for group in self._start_over]
        self._returned |= {_key(group): again for group, again in back}
        self._data_source.add_samples([group for group, _ in back])


def _key(group: Group) -> int | None:
    """Return what tells a group that comes back from others; None for one that its data source did not number."""
    return flatten([group])[0].index
