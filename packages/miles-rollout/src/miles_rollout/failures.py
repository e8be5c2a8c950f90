"""What happens when a hook of the rollout process raises, hangs or returns what it may not.

A call gets a deadline and a few retries; then its group starts over once, from a copy taken before generation; then
the group is dropped and spends the error budget; past it the run stops with the hook's own traceback. Nothing is ever
scored 0 for want of a score. The budget counts over the whole run, across its checkpoints; evaluation does not spend
it.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from miles_api.errors import ConfigError, DataError, HookError, HookResultError, MilesError
from miles_api.options import options_from
from miles_rollout.budget import ErrorBudget
from miles_rollout.options import FailureOptions
from miles_rollout.pristine import copy_sample, restore
from miles_rollout.recording import save_failed
from miles_rollout.threads import HookCall, HookThreads

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from miles_api.args import Args
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample

__all__ = ["Guard", "HookFailed", "HookStopsRunError", "HookTimeoutError", "count_drop", "named"]

Result = TypeVar("Result")

_THREADS = 8
_BACK_OFF = 0.1
"""Seconds before the first retry; doubled for each further one."""
_GRACE = 5.0
"""Seconds a cancelled hook may take to clean up before it is left behind."""
_SAVED = 16
"""Dropped samples written to the run directory; a larger budget is not a reason to fill a disk."""
_REASONS = 64
"""Reasons that drops are counted under; a filter may put a number in its text."""
_NEVER_RAN = {GeneratorType: "a generator", AsyncGeneratorType: "an async generator", CoroutineType: "a coroutine"}

_left_behind: set[asyncio.Future[Any]] = set()
"""Held until they end: to collect a coroutine that catches everything would run it again, perhaps for ever."""


class HookTimeoutError(HookError):
    """A hook ran past --hook-timeout."""


class HookStopsRunError(HookError):
    """A hook did what no retry can mend: it asked the process to exit, or its hung calls hold half the threads."""


class HookFailed(Exception):  # noqa: N818  an outcome that the loop handles, not an error for a user
    """One hook failed for good on one group; what the hook raised is `error`."""

    def __init__(self, hook: BoundHook, subject: list[Sample], error: Exception) -> None:
        super().__init__(f"{named(hook)} failed")
        self.hook = hook
        self.subject = subject
        self.error = error


def named(hook: BoundHook) -> str:
    """Return how errors speak of a hook."""
    return f"{hook.spec.name} hook {hook.reference}"


def count_drop(hook: BoundHook, reason: str) -> str:
    """Count what a hook dropped and return the reason it counts under: `other` once there are many of them."""
    drops = hook.stats.drops
    if reason not in drops and len(drops) >= _REASONS:
        reason = "other"
    drops[reason] = drops.get(reason, 0) + 1
    return reason


class Guard:
    """Calls hooks under the failure policy; one for each event loop."""

    def __init__(self, args: Args) -> None:
        self._args = args
        self.options: FailureOptions = options_from(args, FailureOptions)
        self.budget = ErrorBudget(self.options.hook_error_budget, args.rollout_batch_size or 1)
        self.threads = HookThreads(_THREADS)
        self.grace = min(_GRACE, self.options.hook_timeout)
        """Seconds that a cancelled call is waited for."""

    async def once(self, hook: BoundHook, *arguments: Any, **keywords: Any) -> Any:
        """Call a hook within the deadline, without retries; its own exceptions come through."""
        # Our defaults neither hang nor block; a task of their own for each call would cost more than their work.
        # A hook that calls others through a guard of its own gives each its deadline: waiting for them is no failure.
        if not hook.configured or getattr(hook.target, "bounds_its_parts", False):
            executor = None if hook.is_async else HookCall(self.threads)
            return await hook.acall(executor, *arguments, **keywords)
        call = HookCall(self.threads)
        task = asyncio.ensure_future(_contained(hook, hook.acall(call, *arguments, **keywords)))
        try:
            await self._wait(hook, task, call)
        except asyncio.CancelledError:
            # The rollout needs this call no longer: that is no failure of the hook.
            await self.cancel([task])
            raise
        if not task.done():
            await self._give_up(hook, task, call)
        if task.cancelled():
            hook.stats.errors += 1
            raise HookResultError(f"{named(hook)} raised CancelledError, though nobody had cancelled it")
        result = task.result()
        if type(result) in _NEVER_RAN:
            _refuse(hook, result)
        return result

    async def attempt(
        self, hook: BoundHook, subject: list[Sample], one: Callable[[], Awaitable[Result]], *, fresh: bool = False
    ) -> Result:
        """Await `one()`, a call and the check of its result, and repeat it when it fails; see `again`."""
        before = None if fresh else self.before(hook, subject)
        try:
            return await one()
        except Exception as error:
            first = error
        return await self.again(hook, subject, first, one, fresh=fresh, before=before)

    def before(self, hook: BoundHook, subject: list[Sample]) -> list[Sample] | None:
        """Return copies of the samples that a hook is about to be called with, for `again`; None if it needs none."""
        if not hook.configured or not self.options.hook_retries:
            return None
        try:
            return [copy_sample(sample) for sample in subject]
        except Exception:
            # A hook before this one left something in them that no copy can be made of: the group starts over instead.
            return None

    async def again(
        self,
        hook: BoundHook,
        subject: list[Sample],
        error: Exception,
        one: Callable[[], Awaitable[Result]],
        *,
        fresh: bool = False,
        before: list[Sample] | None = None,
    ) -> Result:
        """Repeat a call that failed with `error`, up to `--hook-retries` times; else raise `HookFailed`.

        What the failed call had done to the samples is undone from `before`; without it the group starts over.
        A call that was given up may still write to the samples it holds: unless `one` takes `fresh` samples every
        time, it is not repeated and the group starts over. What is not the hook's fault comes through at once: a
        wrong option or prompt, and an engine that fails under the default generation.
        """
        tries = 0
        while True:
            if isinstance(error, HookStopsRunError):
                self.stop(HookFailed(hook, subject, error), "the run stops")
            if _is_not_its_fault(hook, error):
                raise error
            spoilt = hook.configured and before is None
            lost = not fresh and (spoilt or isinstance(error, HookTimeoutError))
            if lost or tries >= self.options.hook_retries:
                raise HookFailed(hook, before or subject, error) from error
            hook.stats.retries += 1
            await asyncio.sleep(_BACK_OFF * 2**tries)
            tries += 1
            for sample, copy in zip(subject, before or (), strict=False):
                restore(sample, copy)
            try:
                return await one()
            except Exception as next_error:
                error = next_error

    @contextlib.contextmanager
    def judging(self, hook: BoundHook) -> Iterator[None]:
        """Turn what a check raises into an error of this hook, and count it."""
        try:
            yield
        except MilesError as error:
            hook.stats.errors += 1
            text = str(error)
            raise HookResultError(text if named(hook) in text else f"{named(hook)}: {text}") from error

    def drop(self, failure: HookFailed) -> str:
        """Spend the budget on a lost group and return the reason to count it under; past the budget, stop the run."""
        reason = f"hook_error:{failure.hook.spec.name}"
        count_drop(failure.hook, reason)
        if self.budget.spend():
            self.stop(
                failure,
                f"{self.budget.lost} groups of {self.budget.started} were lost to failing hooks, more than "
                f"--hook-error-budget {self.budget.text} allows",
            )
        saved = self._save(failure) if self.budget.lost <= _SAVED else ""
        print(f"warning: {named(failure.hook)} failed for good, a group is dropped: {failure.error!r}{saved}")
        return reason

    def stop(self, failure: HookFailed, why: str) -> NoReturn:
        """Raise the hook's own exception, with what it failed on and why the run ends here."""
        error, saved = failure.error, self._save(failure)
        remarks = [f"{named(failure.hook)} failed on sample {failure.subject[0].index}", why + saved]
        if isinstance(error, MilesError):
            # Its text is all that the program prints of an error of ours.
            raise type(error)("\n".join([str(error), *remarks])) from error
        for remark in remarks:
            error.add_note(remark)
        raise error

    def _save(self, failure: HookFailed) -> str:
        """Save what a hook failed on for `miles hooks run`; return words that name the file."""
        return save_failed(self._args, failure.hook, failure.subject)

    async def _wait(self, hook: BoundHook, task: asyncio.Future[Any], call: HookCall) -> None:
        """Wait until the task is done or its deadline is past; waiting for a thread does not count."""
        limit = self.options.hook_timeout
        began, remaining = time.monotonic(), limit
        while remaining > 0:
            await asyncio.wait({task}, timeout=remaining)
            if task.done():
                return
            if call.submitted and call.started is None:
                self._require_threads(hook)
                remaining = limit
            else:
                remaining = limit - (time.monotonic() - (call.started or began))

    async def _give_up(self, hook: BoundHook, task: asyncio.Future[Any], call: HookCall) -> NoReturn:
        await self.cancel([task])
        hook.stats.timeouts += 1
        # What it raised while it was cancelled was counted then.
        if not task.done() or task.cancelled() or task.exception() is None:
            hook.stats.errors += 1
        if call.submitted and not call.ended:
            self._require_threads(hook)
        raise HookTimeoutError(f"{named(hook)} ran past --hook-timeout {self.options.hook_timeout:g} s")

    def _require_threads(self, hook: BoundHook) -> None:
        hung = self.hung()
        if hung * 2 >= self.threads.size:
            raise HookStopsRunError(
                f"{hung} of the {self.threads.size} threads for `def` hooks hang in calls that ran past --hook-timeout "
                f"{self.options.hook_timeout:g} s, the last of them {named(hook)}"
            )

    def hung(self) -> int:
        """Return how many threads are stuck in calls past their deadline."""
        # A thread is found hung a moment after its deadline, when the clock of its caller went off.
        return self.threads.hung(self.options.hook_timeout * 0.99)

    async def cancel(self, tasks: list[asyncio.Future[Any]]) -> None:
        """Cancel and wait, but not for ever: a hook that swallows the cancellation is left behind."""
        for task in tasks:
            task.cancel()
        if not tasks:
            return
        done, pending = await asyncio.wait(tasks, timeout=self.grace)
        for task in done:
            # Looked at, so that nobody complains about an exception that was never retrieved.
            if not task.cancelled():
                task.exception()
        _left_behind.update(pending)
        for task in pending:
            task.add_done_callback(_left_behind.discard)

    def close(self) -> None:
        """Let go of the threads."""
        self.threads.close()


async def _contained(hook: BoundHook, call: Awaitable[Any]) -> Any:
    """Turn `SystemExit`, which would end the event loop behind everybody's back, into an error."""
    try:
        return await call
    except SystemExit as error:
        raise HookStopsRunError(
            f"{named(hook)} raised SystemExit({error.code!r}): a hook may not end the process; the run stops"
        ) from error


def _refuse(hook: BoundHook, result: Any) -> NoReturn:
    """Refuse a result that is code which was never run: the hook did nothing, and nobody would notice."""
    if not isinstance(result, AsyncGeneratorType):
        result.close()
    hook.stats.errors += 1
    raise HookResultError(f"{named(hook)} returned {_NEVER_RAN[type(result)]}, whose code never ran")


def _is_not_its_fault(hook: BoundHook, error: Exception) -> bool:
    ours = not hook.configured or hook.origin.distribution == "miles-rollout"
    if not ours or isinstance(error, HookResultError):
        return False
    return isinstance(error, MilesError if hook.spec.name == "generate" else (ConfigError, DataError))
