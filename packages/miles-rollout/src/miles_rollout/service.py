"""The rollout process: hooks resolved, one rollout or evaluation at a time, samples turned into columns."""

from __future__ import annotations

import asyncio
import gc
import inspect
import time
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import uvloop

from miles_api import generators
from miles_api.args import Args
from miles_api.batch import check_columns
from miles_api.errors import HookResultError
from miles_api.loading.hookset import HookSet
from miles_api.record import RecordedRollout
from miles_api.rollout_types import (
    RolloutFnConstructorInput,
    RolloutFnEvalInput,
    RolloutFnTrainInput,
    RolloutFnTrainOutput,
    flatten,
)
from miles_api.run_options import RunOptions
from miles_rollout import checkpoint
from miles_rollout.data_source import RolloutDataSourceWithBuffer
from miles_rollout.evaluate import checked_evaluation, eval_metrics
from miles_rollout.failures import Guard, named
from miles_rollout.hook_names import CALLED_BY_SERVICE
from miles_rollout.identity import require_identity
from miles_rollout.metrics import HookCounts, rollout_metrics
from miles_rollout.older_weights import train_on
from miles_rollout.recording import Recorder
from miles_rollout.results import checked_groups, checked_rewards, checked_samples, require_numbers
from miles_rollout.running import announce, of_loop
from miles_rollout.shown import shown_samples

if TYPE_CHECKING:
    from miles_api.config import RunConfig
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample
    from miles_rollout.state import State

__all__ = ["RolloutWorker", "create"]


_COLLECT_AFTER = 100_000
"""Container objects allocated between two runs of the garbage collector; Python's default is 700."""
_CLOSING = 60.0
"""Seconds that all hooks together may take to close."""


def create(config: RunConfig) -> RolloutWorker:
    """Build the rollout service of a run; the entry point `miles.services: rollout`."""
    return RolloutWorker(config)


class RolloutWorker:
    """Implements `RolloutService`; runs the rollout hook on an event loop of its own."""

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._run = config.group(RunOptions)
        self._loop = uvloop.new_event_loop()
        # Not `asyncio.Runner.run`: its signal handling prints the finished task, so the whole rollout, to no use.
        self._wait = self._loop.run_until_complete
        path = self._run.save_debug_rollout_data
        self._recorder = Recorder(path, config.public()) if path else None
        self._counts = HookCounts()

    def start(self, router_url: str) -> None:
        """Resolve hooks, read the prompts, build the rollout hook. `router_url` is empty when no engine runs."""
        address = urlsplit(router_url)
        where = {"sglang_router_ip": address.hostname or "", "sglang_router_port": address.port or 0}
        self._args = Args({**self._config.flat(), **where})
        announce(self._args)
        self._guard = Guard(self._args)
        self._hooks = HookSet(self._args, CALLED_BY_SERVICE)
        self._source_args = self._hooks.need("data_source").view or self._args
        # Recorded rollouts bring their prompts along.
        replayed = self._run.load_debug_rollout_data is not None
        source = None if replayed else self._hooks.build("data_source", self._source_args)
        self._data_source: Any = source and source.target
        self._rollout = self._built("rollout")
        self._eval = self._rollout if self._hooks.one("eval_rollout") is None else self._built("eval_rollout")
        if self._run.deterministic:
            generators.seed(self._args.rollout_seed)
        # What is loaded by now stays, and requests leave few cycles: the default collector took a fifth of a rollout.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER)

    def _built(self, name: str) -> BoundHook:
        """Build the class form, once; an evaluation hook that is the rollout hook is the same instance."""
        view = self._hooks.need(name).view or self._args
        hook = self._hooks.build(name, RolloutFnConstructorInput(args=view, data_source=self._data_source))
        assert hook is not None
        return hook

    def _call(self, hook: BoundHook, request: RolloutFnTrainInput | RolloutFnEvalInput) -> Any:
        """Make a whole rollout or evaluation, without deadline: how long one takes is the user's business."""
        if isinstance(hook.form.stub, type):
            arguments: tuple[Any, ...] = (request,)
        else:
            arguments = (self._args, request.rollout_id, self._data_source, request.evaluation)
        if hook.is_async:
            return self._wait(hook.acall(None, *arguments))
        result = hook(*arguments)
        return self._wait(_awaited(result)) if inspect.isawaitable(result) else result

    def _once(self, hook: BoundHook, *arguments: Any, **keywords: Any) -> Any:
        """Call a hook that runs once a rollout: within the deadline, and what it raises stops the run.

        Not repeated: nobody knows what it had changed by then.
        """
        if not hook.configured and not hook.is_async:
            return hook(*arguments, **keywords)
        return self._wait(self._guard.once(hook, *arguments, **keywords))

    def generate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Produce one rollout and its columns."""
        started = time.perf_counter()
        if self._recorder:
            self._recorder.open()
        if isinstance(self._data_source, RolloutDataSourceWithBuffer):
            self._data_source.rollout_id = rollout_id
        request = RolloutFnTrainInput(rollout_id=rollout_id, weight_version=weight_version)
        output = self._checked_output(self._call(self._rollout, request))
        generated = time.perf_counter()
        masked = self._filter(output, weight_version) if self._data_source is not None else {}
        samples = sorted(flatten(output.samples), key=lambda s: (s.group_index or 0, s.index or 0))
        record = self._record_of(output, rollout_id, weight_version)
        try:
            raw, rewards = self._rewards(samples)
            record.raw_rewards, record.rewards = list(raw), list(rewards)
            batch = self._columns(samples, raw, rewards)
            record.metrics = metrics = {**rollout_metrics(self._args, samples), **masked, **output.metrics}
        finally:
            # Written even when conversion fails: then it is most wanted.
            if self._recorder:
                self._recorder.write(record)
        seconds = {"generate": generated - started, "convert": time.perf_counter() - generated}
        extra = output.metrics
        silent = self._log("rollout_log", extra, rollout_id, self._args, samples, extra, seconds["generate"])
        report = self.report()
        return {
            "batch": batch,
            "metrics": {} if silent else metrics | extra | self._counts.metrics(report),
            "samples": shown_samples(output.samples, self._run.report_samples),
            "seconds": seconds,
            "hooks": report,
        }

    def _record_of(self, output: RolloutFnTrainOutput, rollout_id: int, weight_version: str) -> RecordedRollout:
        if self._recorder is None:
            return RecordedRollout(rollout_id=rollout_id)
        dropped = getattr(self._rollout.target, "dropped_groups", list)()
        return self._recorder.rollout(rollout_id, weight_version, output.samples, dropped)

    def _checked_output(self, output: Any) -> RolloutFnTrainOutput:
        who = named(self._rollout)
        if isinstance(output, list):
            output = RolloutFnTrainOutput(samples=output)
        with self._guard.judging(self._rollout):
            if not isinstance(output, RolloutFnTrainOutput):
                raise HookResultError(f"{who} returned {type(output).__name__}, not RolloutFnTrainOutput")
            checked_groups(output.samples, self._args.rollout_batch_size, who)
            if self._rollout.configured:
                checked_samples(flatten(output.samples), who)
            require_identity(output.samples, who)
        return output

    def _filter(self, output: RolloutFnTrainOutput, weight_version: str) -> dict[str, float]:
        for hook in self._hooks.many("sample_filter"):
            self._once(hook, self._args, output.samples)
            with self._guard.judging(hook):
                checked_groups(output.samples, self._args.rollout_batch_size, f"what {named(hook)} left:")
                checked_samples(flatten(output.samples), named(hook))
        return train_on(self._args, flatten(output.samples), weight_version)

    def _rewards(self, samples: list[Sample]) -> tuple[list[float], list[float]]:
        hook = self._hooks.need("reward_post_process")
        result = self._once(hook, self._args, samples if not hook.configured else list(samples))
        with self._guard.judging(hook):
            if hook.configured:
                checked_samples(samples, named(hook))
            return checked_rewards(result, samples, named(hook))

    def _log(self, name: str, metrics: dict[str, float], *arguments: Any) -> bool:
        """Call log hooks, which may add to `metrics`; return whether one of them suppresses the built-in log."""
        silent = False
        for hook in self._hooks.many(name):
            silent |= self._once(hook, *arguments) is True
            with self._guard.judging(hook):
                require_numbers(metrics, named(hook))
        return silent

    def _columns(self, samples: list[Sample], raw: list[float], rewards: list[float]) -> dict[str, Any]:
        hook = self._hooks.need("convert_samples")
        batch = self._once(hook, self._args, samples, raw_rewards=list(raw), rewards=list(rewards))
        with self._guard.judging(hook):
            if not isinstance(batch, dict):
                raise HookResultError(f"{named(hook)} returned {type(batch).__name__}, not a dict of columns")
            check_columns(batch)
        return batch

    def evaluate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Run the evaluation hook and return its metrics."""
        if self._recorder:
            self._recorder.open()
        request = RolloutFnEvalInput(rollout_id=rollout_id, weight_version=weight_version)
        result = self._call(self._eval, request)
        with self._guard.judging(self._eval):
            output = checked_evaluation(result, named(self._eval))
        silent = self._log("eval_rollout_log", output.metrics, rollout_id, self._args, output.data, output.metrics)
        samples = [s for part in output.data.values() for s in part["samples"]]
        key = self._args.eval_reward_key or self._args.reward_key
        metrics = {} if silent else {**eval_metrics(output.data, key), **output.metrics}
        if self._recorder:
            self._recorder.write(self._recorder.evaluation(rollout_id, weight_version, samples, metrics))
        shown = shown_samples([[s] for s in samples], self._run.report_samples)
        return {"metrics": metrics, "samples": shown, "hooks": self.report()}

    def save(self, rollout_id: int, directory: str) -> None:
        """Write the states of data source, loop and hooks to a staging directory; `DataError` if it cannot be."""
        if self._data_source is not None:
            checkpoint.save_source(self._data_source, self._source_args, rollout_id, directory)
        loop = self._rollout.target
        state = checkpoint.RolloutState(
            loop=loop.state_dict() if hasattr(loop, "state_dict") else None,
            hooks=self._counts.state_dict(self.report()),
            random=generators.states(),
        )
        checkpoint.write(directory, state)

    def load(self, rollout_id: int, directory: str) -> None:
        """Continue from what `save` wrote; records of later rollouts are cut. Raises `DataError` if it does not fit.

        With `--reset-data-source` the prompts begin anew, and with them what the loop knew of groups.
        """
        if self._recorder:
            self._recorder.continue_after(rollout_id)
        state = checkpoint.read(directory)
        if self._data_source is not None and not self._run.reset_data_source:
            checkpoint.load_source(self._data_source, self._source_args, rollout_id, directory)
            if state.loop is not None and hasattr(self._rollout.target, "load_state_dict"):
                self._rollout.target.load_state_dict(state.loop)
        self._counts.load_state_dict(state.hooks)
        if self._run.load_rng:
            generators.restore(state.random)

    @property
    def _borrowed(self) -> State | None:
        """What a rollout hook that is no default loop uses of it, once it does."""
        state = of_loop(self._loop)
        return None if state is None or hasattr(self._rollout.target, "report") else state

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks this process has and how they fared, for `hooks.json`."""
        # The default rollout and data source call hooks of their own; so may a rollout that builds on its parts.
        parts = (self._hooks, self._data_source, self._borrowed or self._rollout.target)
        return [line for part in parts for line in getattr(part, "report", list)()]

    def stop(self) -> None:
        """Close every hook that can be closed, and the event loop, whatever still runs in it."""
        if self._recorder:
            self._recorder.close()
        self._guard.close()
        try:
            self._wait(asyncio.wait_for(self._close_hooks(), _CLOSING))
        finally:
            left = asyncio.all_tasks(self._loop)
            for task in left:
                task.cancel()
            if left:
                # A hook that swallows its cancellation is not waited for.
                self._wait(asyncio.wait(left, timeout=self._guard.grace))
            self._loop.close()
            # What `start` kept from the collector may go.
            gc.unfreeze()

    async def _close_hooks(self) -> None:
        try:
            await self._hooks.aclose()
        finally:
            if (state := self._borrowed) is not None:
                await state.close()


async def _awaited(result: Any) -> Any:
    return await result
